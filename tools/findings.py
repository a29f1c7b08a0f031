"""What tools.search found: the table, what of it chance could have done, CSV and pictures."""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from scipy import stats

import plots
from support.files import as_csv, write_file
from support.history import duration
from tools.studies import Parameter, counted, label, living, point, short

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

BEST = 10  # trials of --tune in the table; as many settings have a colour
ENOUGH = 10  # complete trials, before importance means anything
COLOURS = [*(f"C{number}" for number in (0, 1, 2, 3, 4, 5, 6, 8, 9)), "black"]  # C7 is grey
FAINT = {"color": "grey", "alpha": 0.3, "linewidth": 0.8}


def complete(trials: Sequence["FrozenTrial"]) -> list["FrozenTrial"]:
    """Those that were trained to their end."""
    return [trial for trial in trials if trial.state.name == "COMPLETE"]


# ---------------------------------------------------------------- a grid


def rows_of(settings: Sequence[dict], trials: Sequence["FrozenTrial"]) -> list[dict]:
    """A row for each setting: accuracies over its seeds, in percent, and compared with the first.

    Its keys: `setting`; `seeds`, how many were trained to their end; `mean` and `deviation`, of the
    sample; `difference` to the first row, the mean over the seeds that both have (`pairs`), and its
    standard `error`, the deviation of these differences over sqrt(pairs); `seconds` of a training;
    `diverged`, how many did. What is not known is None.
    """
    found: dict[tuple, FrozenTrial] = {}
    for trial in living(trials):
        found.setdefault(point(trial), trial)
    rows = []
    for setting in settings:
        mine = [trial for each, trial in found.items() if setting.items() <= dict(each).items()]
        ended = {dict(point(trial))["seed"]: trial for trial in complete(mine)}
        accuracies = {seed: trial.value for seed, trial in sorted(ended.items())}
        seconds = [trial.user_attrs["seconds"] for trial in ended.values()]
        first = rows[0]["by_seed"] if rows else {}
        differences = [accuracies[seed] - first[seed] for seed in accuracies if seed in first]
        pairs = len(differences)
        deviation = statistics.stdev(differences) if pairs > 1 else None
        rows.append(
            {
                "setting": setting,
                "by_seed": accuracies,
                "seeds": len(accuracies),
                "mean": statistics.mean(accuracies.values()) if accuracies else None,
                "deviation": statistics.stdev(accuracies.values()) if len(ended) > 1 else None,
                "pairs": pairs,
                "difference": statistics.mean(differences) if pairs else None,
                "error": None if deviation is None else deviation / math.sqrt(pairs),
                "seconds": statistics.mean(seconds) if seconds else None,
                "diverged": sum("diverged" in trial.user_attrs for trial in mine),
            }
        )
    return rows


def verdict(rows: Sequence[dict]) -> str:
    """In words, which differences to the first row are more than twice their standard error."""
    others = [row for row in rows[1:] if row["pairs"]]
    if not others:
        return "Nothing to compare yet."
    known = [row for row in others if row["error"] is not None]
    alone = [row for row in others if row["error"] is None]
    parts = []
    if known:
        first = label(rows[0]["setting"])
        clear = [row for row in known if abs(row["difference"]) > 2 * row["error"]]
        better = [label(row["setting"]) for row in clear if row["difference"] > 0]
        worse = [label(row["setting"]) for row in clear if row["difference"] < 0]
        unclear = [label(row["setting"]) for row in known if row not in clear]
        for names, what in ((better, "better"), (worse, "worse")):
            if names:
                told = f"more than twice the standard error {what} than {first}"
                parts.append(f"{'; '.join(names)}: {told}.")
        if unclear:
            parts.append(f"{'; '.join(unclear)}: cannot be told from {first}, it may be chance.")
        pairs = min(row["pairs"] for row in known)
        # Of Student's distribution: so few seeds know their own deviation badly.
        chance = 200 * stats.t.sf(2, pairs - 1)
        parts.append(
            f"With {pairs} seeds chance alone goes beyond twice the error in {chance:.0f} % of "
            f"comparisons ({len(known)} here)."
        )
    if alone:
        names = "; ".join(label(row["setting"]) for row in alone)
        parts.append(
            f"{names}: one seed tells nothing, since another seed would change the accuracy too; "
            "give --seeds 3 or more."
        )
    return "\n".join(parts)


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first ones flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not number else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.2f}" + ("" if error is None else f" ± {error:.2f}")


def grid_table(rows: Sequence[dict]) -> str:
    """The rows as text."""
    lines = [("setting", "seeds", "held-out accuracy (%)", "difference to the first", "time each")]
    for number, row in enumerate(rows):
        seeds = str(row["seeds"]) + (f" ({row['diverged']} diverged)" if row["diverged"] else "")
        lines.append(
            (
                label(row["setting"]),
                seeds,
                _with_error(row["mean"], row["deviation"]),
                _with_error(row["difference"], row["error"], "+") if number else "",
                "" if row["seconds"] is None else duration(row["seconds"]),
            )
        )
    return f"{_table(lines)}\n(mean ± standard deviation; paired difference ± its standard error)"


# ---------------------------------------------------------------- --tune


def best_first(trials: Sequence["FrozenTrial"]) -> list["FrozenTrial"]:
    """The complete trials, by their accuracy."""
    return sorted(complete(trials), key=lambda trial: (-trial.value, trial.number))


def tune_table(trials: Sequence["FrozenTrial"]) -> str:
    """The best trials as text, and what to do with them."""
    ended, names = best_first(trials), [trial.state.name for trial in trials]
    diverged = sum("diverged" in trial.user_attrs for trial in trials)
    counts = f"{len(ended)} trained to the end, {names.count('PRUNED')} pruned"
    counts += f" ({diverged} of them diverged)" if diverged else ""
    if not ended:
        return counts
    lines = [("trial", "held-out accuracy (%)", "time", "setting")]
    for trial in ended[:BEST]:
        seconds = duration(trial.user_attrs["seconds"])
        lines.append((str(trial.number), f"{trial.value:.2f}", seconds, label(trial.params)))
    width = max(len(line[-1]) for line in lines)
    table = _table([(*line[:-1], line[-1].ljust(width)) for line in lines])
    return (
        f"{table}\n{counts}\nOne seed each, and the best of {len(ended)}: partly luck. Compare it "
        "with the recipe by --grid and --seeds 3 or more before it is believed."
    )


# ---------------------------------------------------------------- pictures


def _places(parameter: Parameter, values: Sequence) -> tuple[list[float], list[str]]:
    """Where values stand on the axis, and the names of categories ([] of numbers)."""
    if parameter.low is not None:
        return list(values), []
    return [parameter.values.index(value) for value in values], list(map(str, parameter.values))


def parameters_picture(space: Sequence[Parameter], trials: Sequence["FrozenTrial"]) -> bytes:
    """A panel for each parameter: the accuracy of each complete trial; the pruned ones as ticks."""
    shown = [each for each in space if each.key != "seed"]
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(max(6, 4.6 * columns), 4 * lines + 0.8), layout="constrained")
    figure.suptitle("Accuracy on held-out training images, after the last epoch")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    ended, pruned = complete(trials), [t for t in trials if t.state.name == "PRUNED"]
    best = max((trial.value for trial in ended), default=None)
    for axes, parameter in itertools.zip_longest(grid.flat, shown):
        if parameter is None:
            axes.set_visible(False)
            continue
        key = parameter.key
        places, names = _places(parameter, [trial.params[key] for trial in ended])
        values = [trial.value for trial in ended]
        axes.plot(places, values, "o", color=plots.TRAIN, alpha=0.6, ms=5, label="a training")
        if parameter.values:
            groups = {place: [] for place in sorted(set(places))}
            for place, value in zip(places, values, strict=True):
                groups[place].append(value)
            means = [statistics.mean(group) for group in groups.values()]
            spread = [statistics.stdev(g) if len(g) > 1 else 0 for g in groups.values()]
            look = {"fmt": "_", "color": "black", "ms": 14, "capsize": 4}
            axes.errorbar(list(groups), means, spread, label="mean ± deviation", **look)
        else:
            top = [trial for trial in ended if trial.value == best][:1]
            where = _places(parameter, [trial.params[key] for trial in top])[0]
            axes.plot(where, [best] * len(top), "*", color=plots.MARK, ms=14, label="the best")
        if pruned:
            where = _places(parameter, [trial.params[key] for trial in pruned])[0]
            look = {"color": "grey", "alpha": 0.6, "ms": 9, "label": f"pruned ({len(pruned)})"}
            axes.plot(
                where, [0.02] * len(pruned), "|", transform=axes.get_xaxis_transform(), **look
            )
        tried = [value for value in parameter.values if parameter.low is not None]
        if names:
            axes.set_xticks(range(len(names)), names)
        elif parameter.log:
            axes.set_xscale("log")
            wide = parameter.high / parameter.low > 300
            axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        elif tried and len(tried) <= 8:
            if min(tried) > 0 and max(tried) / min(tried) >= 10:
                axes.set_xscale("log")
            axes.set_xticks(tried, [short(value) for value in tried])
            axes.minorticks_off()
        axes.margins(x=0.12, y=0.1)
        axes.set(xlabel=key, ylabel="accuracy (%)")
        axes.tick_params(labelleft=True)
        axes.grid(alpha=0.3)
    known = {}
    for axes in grid.flat:
        known |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(known.values(), known, loc="outside lower center", ncols=4)
    return plots.png(figure)


def importance(study: "Study", space: Sequence[Parameter]) -> dict[str, float] | str:
    """Each parameter's share of the accuracy's variance (fANOVA), or why there is none."""
    import optuna

    keys = [each.key for each in space if len(set(each.ends)) > 1]
    count = len(complete(study.get_trials(deepcopy=False)))
    if len(keys) < 2:
        return "it takes two parameters"
    if count < ENOUGH:
        return f"it takes {ENOUGH} trials that were trained to the end, there are {count}"
    try:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return optuna.importance.get_param_importances(study, evaluator=evaluator, params=keys)
    except (RuntimeError, ValueError) as error:  # no variance at all
        return str(error)


def importance_picture(shares: dict[str, float], count: int) -> bytes:
    """Bars of each parameter's share; `seed` is what chance does."""
    figure = Figure(figsize=(7, 1.6 + 0.5 * len(shares)), layout="constrained")
    axes = figure.subplots()
    keys = list(shares)[::-1]
    bars = axes.barh(keys, [100 * shares[key] for key in keys], color=plots.TRAIN)
    axes.bar_label(bars, fmt="%.0f %%", padding=3)
    axes.set(xlim=(0, 115), xlabel="share of the accuracy's variance (%)")
    axes.set_title(f"Importance in {count} complete trials (fANOVA)")
    return plots.png(figure)


def epochs_picture(trials: Sequence["FrozenTrial"], settings: Sequence[dict]) -> bytes:
    """Accuracy by epoch of all trials: the best in colour, the pruned ones faint."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots()
    axes.set(title="Accuracy on held-out training images by epoch", xlabel="epoch")
    axes.set_ylabel("accuracy (%)")

    def named(trial: "FrozenTrial") -> str:
        params = {key: value for key, value in trial.params.items() if key != "seed"}
        return label(params) if settings else f"{label(params)}: {trial.value:.2f}"

    ranking = list(dict.fromkeys(map(named, best_first(trials))))
    known, longest = {}, 1
    for trial in sorted(trials, key=lambda trial: trial.state.name == "COMPLETE"):
        if not trial.intermediate_values:
            continue
        epochs, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        longest = max(longest, *epochs)
        name, look = "pruned", FAINT
        if trial.state.name in ("RUNNING", "WAITING"):
            name, look = "not at its end", FAINT | {"linestyle": ":"}
        elif trial.state.name == "COMPLETE":
            name, look = "others", {"color": "skyblue", "linewidth": 1}
            if (place := ranking.index(named(trial))) < BEST:
                name, look = ranking[place], {"color": COLOURS[place], "linewidth": 1.6}
        (line,) = axes.plot(epochs, values, marker="o", ms=3, **look)
        known.setdefault(name, line)
    axes.set_xlim(0.5, longest + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    shown = [*(name for name in ranking if name in known), "others", "pruned", "not at its end"]
    known = {name: known[name] for name in shown if name in known}
    figure.legend(known.values(), known, loc="outside right upper", fontsize=8)
    return plots.png(figure)


# ---------------------------------------------------------------- all of it


def _trial_row(trial: "FrozenTrial", keys: Sequence[str]) -> dict:
    epochs = sorted(trial.intermediate_values.items())
    return {
        "trial": trial.number,
        "state": "DIVERGED" if "diverged" in trial.user_attrs else trial.state.name,
        **{key: trial.params.get(key) for key in keys},
        "accuracy": trial.value if trial.state.name == "COMPLETE" else None,
        "epochs": len(epochs),
        "last_accuracy": epochs[-1][1] if epochs else None,
        **{key: trial.user_attrs.get(key) for key in ("seconds", "machine", "folder")},
    }


def write(
    folder: Path, study: "Study", space: Sequence[Parameter], settings: Sequence[dict]
) -> None:
    """Prints what the study knows so far; tables and pictures go into the folder.

    Args:
        settings: of a grid, in the order of its table; none for --tune.
    """
    trials = counted(study.get_trials(deepcopy=False))
    ended, files = complete(trials), {}
    if settings:
        rows = rows_of(settings, trials)
        text = f"{grid_table(rows)}\n\n{verdict(rows)}"
        plain = [row["setting"] | {k: row[k] for k in row if k not in ("setting", "by_seed")}
                 for row in rows]  # fmt: skip
        files["results.csv"] = as_csv(plain)
    else:
        text = tune_table(trials)
    shares = importance(study, space)
    if isinstance(shares, str):
        text += f"\nImportance is left out: {shares}."
    elif ended:
        files["importance.png"] = importance_picture(shares, len(ended))
    if trials:
        files["trials.csv"] = as_csv([_trial_row(t, [p.key for p in space]) for t in trials])
    if ended:
        files["parameters.png"] = parameters_picture(space, trials)
        files["epochs.png"] = epochs_picture(trials, settings)
    files["results.txt"] = text + "\n"
    with filelock.FileLock(folder / ".lock"):  # another worker's, at the same moment
        for name, content in files.items():
            write_file(folder / name, content)
    print(f"\n{text}\n\nResults: {folder}", flush=True)
