"""The picture of a training run."""

from __future__ import annotations

import io

from shira.cli.train.training import Training

_INK = "#303438"


def picture(found: Training) -> bytes:
    """The training curve as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    steps = range(1, len(found.losses) + 1)
    window = max(1, len(found.losses) // 20)
    near = window // 2  # on either side
    parts = [found.losses[max(0, i - near) : i + near + 1] for i in range(len(found.losses))]
    smooth = [sum(part) / len(part) for part in parts]
    label = "training, each batch"
    if window > 1:
        axes.plot(steps, found.losses, color="#2f6fb5", alpha=0.3, linewidth=1)
        label += f" and the mean of {2 * near + 1}"
    axes.plot(steps, smooth, ".-" if window == 1 else "-", color="#2f6fb5", linewidth=2, label=label)
    title = f"{found.adapter.nnz} entries, {found.adapter.density:.2%} of the tensors"
    if found.held_out_examples:
        ends = [found.held_out_before["loss"], found.held_out_after["loss"]]
        axes.plot([0, len(found.losses)], ends, "o", color="#d9772b", label="held out, before and after", clip_on=False)
        for step, loss in zip((0, len(found.losses)), ends, strict=True):
            axes.annotate(f"{loss:.3f}", (step, loss), (0, 9), textcoords="offset points", ha="center", color="#d9772b")
    else:
        title += "; no example was held out"
    axes.margins(y=0.1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss (nats)", color=_INK)
    axes.set_title(title, loc="left", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
