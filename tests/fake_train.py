"""A train.py that trains nothing: run folders as the real one leaves them, for tests of a search.

Accuracy is told by lr, seed and epoch (see `accuracy`); "lr" of 13 diverges, of 7 ends with an
error until FAKE_MENDED is there. Nothing but the standard library, so that it starts in no time.
"""

import argparse
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path


def accuracy(lr: float, seed: int, epoch: int) -> float:
    """In percent: best at an lr of 0.1, which nothing but chance (the seed) blurs."""
    return 60 + 5 * epoch - 100 * abs(lr - 0.1) + seed * (1 if lr == 0.1 else 0.5)


def main() -> int:
    """Trains a run, or goes on with one; returns train.py's exit statuses."""
    parser = argparse.ArgumentParser()
    for flag in ("model", "epochs", "seed", "val-split", "data-dir", "output-dir", "resume"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--device")
    parser.add_argument("--set", action="append", default=[])
    for flag in ("no-test", "dry-run"):
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args()
    if args.resume:
        run = Path(args.resume)
        told = json.loads((run / "settings.json").read_text())
    else:
        run = Path(args.output_dir) / "20260101-000000-fake"
        run.mkdir(parents=True)
        told = vars(args) | {"threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}
    lock = os.open(run / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("train.py: error: in use", file=sys.stderr)
        return 2
    with open(run / "starts.txt", "a") as file:
        file.write("resumed\n" if args.resume else "began\n")
    (run / "settings.json").write_text(json.dumps(told))
    given = dict(entry.split("=") for entry in told["set"])
    lr, seed, epochs = float(given.get("lr", 0.1)), int(told["seed"]), int(told["epochs"])
    if lr == 7 and not os.path.exists(os.environ["FAKE_MENDED"]):
        print("train.py: error: the disk is full", file=sys.stderr)
        return 1
    if lr == 13:
        print("train.py: error: the loss became nan: the training diverged", file=sys.stderr)
        return 1
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(143))
    signal.signal(signal.SIGINT, lambda *_: stopped.append(130))
    table = run / "log.csv"
    lines = table.read_text().splitlines() if table.exists() else []
    lines = lines or ["epoch,val_acc,train_seconds,test_seconds"]
    for epoch in range(len(lines), epochs + 1):
        end = time.monotonic() + float(os.environ.get("FAKE_SECONDS", "0"))
        while time.monotonic() < end and not stopped:
            time.sleep(0.01)
        if stopped:
            return stopped[0]
        lines.append(f"{epoch},{accuracy(lr, seed, epoch)},2.0,1.0")
        part = run / ".log.csv.part"
        part.write_text("\n".join(lines) + "\n")
        part.rename(table)
    results = {"completed": True, "evaluated": "val", "final_accuracy": accuracy(lr, seed, epochs)}
    part = run / ".results.json.part"
    part.write_text(json.dumps(results))
    part.rename(run / "results.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
