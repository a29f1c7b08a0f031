"""The figures of a run, a row an epoch, as a line, a table and a summary."""

import statistics
from pathlib import Path

from support.meter import Metrics


class History:
    """The figures of a run, a row an epoch, and what follows from them.

    A row holds epoch, lr (at the end of the epoch), train_loss, train_acc, then {split}_loss and
    {split}_acc of the split that is evaluated each epoch ("test" or "val"), train_seconds and
    test_seconds. Losses are in nats, accuracies in percent.
    """

    def __init__(self, split: str, epochs: int, target: float, target_epochs: int) -> None:
        self.split = split
        self.epochs = epochs
        self.target = target
        self.target_epochs = target_epochs
        self.rows: list[dict] = []

    def add(
        self, lr: float, train: Metrics, evaluated: Metrics, seconds: tuple[float, float]
    ) -> None:
        """Adds the row of the next epoch; seconds of its training and of its evaluation."""
        self.rows.append(
            {
                "epoch": len(self.rows) + 1,
                "lr": lr,
                "train_loss": train.loss,
                "train_acc": train.accuracy,
                f"{self.split}_loss": evaluated.loss,
                f"{self.split}_acc": evaluated.accuracy,
                "train_seconds": seconds[0],
                "test_seconds": seconds[1],
            }
        )

    @property
    def accuracies(self) -> list[float]:
        """Of the evaluated split, an epoch each, in percent."""
        return [row[f"{self.split}_acc"] for row in self.rows]

    @property
    def best_epoch(self) -> int:
        """The first epoch of the highest accuracy."""
        return self.accuracies.index(max(self.accuracies)) + 1

    @property
    def target_epoch(self) -> int | None:
        """The first epoch at or above the target, if any."""
        reached = (epoch for epoch, value in enumerate(self.accuracies, 1) if value >= self.target)
        return next(reached, None)

    def beginning(self) -> str:
        """How the last epoch's line begins."""
        return f"Epoch [{len(self.rows):>{len(str(self.epochs))}}/{self.epochs}]"

    def line(self) -> str:
        """The last epoch in one line, with the time left and its marks."""
        row = self.rows[-1]
        epoch = row["epoch"]
        seconds = [past["train_seconds"] + past["test_seconds"] for past in self.rows]
        line = (
            f"{self.beginning()} - "
            f"Train: {row['train_acc']:5.2f}% | "
            f"{self.split.capitalize()}: {self.accuracies[-1]:5.2f}% | "
            f"loss {row['train_loss']:.3f}/{row[f'{self.split}_loss']:.3f} | "
            f"lr {row['lr']:.4f} | {seconds[-1]:.1f}s"
        )
        if epoch < self.epochs:
            # Not the mean: a laptop that slept would count for all epochs that follow.
            line += f" | {duration(statistics.median(seconds) * (self.epochs - epoch))} left"
        if self.best_epoch == epoch:
            line += " | best so far"
        if self.target_epoch == epoch:
            line += f" | target {self.target:g}% reached"
        return line

    def summary(self) -> dict:
        """The figures that matter at the end; accuracies in percent."""
        last = self.rows[-1]
        train, test = (
            sum(row[f"{part}_seconds"] for row in self.rows) for part in ("train", "test")
        )
        return {
            "epochs_asked": self.epochs,
            "epochs_done": last["epoch"],
            "split": self.split,
            "last_accuracy": self.accuracies[-1],
            "best_accuracy": max(self.accuracies),
            "best_epoch": self.best_epoch,
            "target_accuracy": self.target,
            "target_epochs": self.target_epochs,
            "target_reached_at": self.target_epoch,
            "train_accuracy": last["train_acc"],
            "gap_points": last["train_acc"] - self.accuracies[-1],
            "train_seconds": train,
            "test_seconds": test,
            "total_seconds": train + test,
        }

    def results(self, split: str, evaluated: Metrics, completed: bool) -> dict:
        """What results.json holds; `evaluated` are the final weights, on `split`."""
        final = {"final_loss": evaluated.loss, "final_accuracy": evaluated.accuracy}
        return self.summary() | {"completed": completed, "evaluated": split} | final

    def table(self, evaluated: str, accuracy: float, folder: Path) -> str:
        """The results as a table; `evaluated` ("test" or "val") and `accuracy` are the final."""
        f, split = self.summary(), self.split
        best = "best.pt" if (folder / "best.pt").is_file() else "its weights are gone"
        reached = f["target_reached_at"]
        train, test, total = (duration(f[f"{x}_seconds"]) for x in ("train", "test", "total"))
        rows = {
            f"final {evaluated} accuracy": f"{accuracy:.2f} %  (epoch {f['epochs_done']}, last.pt)",
            f"best {split} accuracy": f"{f['best_accuracy']:.2f} %  (epoch {f['best_epoch']}, "
            f"{best}; picked by looking at the {split} set)",
            f"target {self.target:g} % within {self.target_epochs}": (
                f"reached at epoch {reached}" if reached else "not reached"
            ),
            f"train/{split} gap": f"{f['gap_points']:+.2f} points  "
            "(train: augmented, during the epoch)",
            "time": f"{total}  (training {train}, evaluation {test})",
            "pictures and log": str(folder),
        }
        width, rule = max(map(len, rows)), "-" * 80
        return "\n".join([rule, *(f"{name:<{width}}  {rows[name]}" for name in rows), rule])


def duration(seconds: float) -> str:
    """Seconds as "48s", "4m12s" or "1h05m"."""
    minutes, whole = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{whole:02d}s" if minutes else f"{whole}s"
