"""The figure of how-it-works.md, from the weights of a real model:

    python docs/how_it_works.py --model FOLDER [--output docs/how-it-works.png]

FOLDER holds a Hugging Face checkpoint of a BERT with its model.safetensors, as all-MiniLM-L6-v2 has it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from compressor.config import CompressionConfig, KSVDConfig
from compressor.ksvd import factorize, relative_error, svd_error
from compressor.omp import dense_codes, reconstruct

NAME, ROLE = "encoder.layer.3.intermediate.dense.weight", "ffn1"
BLOCK, SHOWN = 0, 48  # which block of columns is drawn, and how many of its rows
PRESETS = ("2x", "2.8x", "3.57x")


def read_weight(folder: Path) -> torch.Tensor:
    tensors = load_file(str(folder / "model.safetensors"))
    found = [tensor for name, tensor in tensors.items() if name.endswith(NAME)]
    if not found:
        sys.exit(f"{folder} has no weight {NAME}; expected a BERT of at least four layers.")
    return found[0].float()


def draw(weight: torch.Tensor, output: Path) -> None:
    plans = {preset: CompressionConfig(preset, block_size=32).plan(NAME, ROLE, *weight.shape) for preset in PRESETS}
    made = {preset: factorize(weight, plan, KSVDConfig(iterations=20)) for preset, plan in plans.items()}
    result, plan = made["2.8x"], plans["2.8x"]
    again = reconstruct(result.dictionary, result.indices, result.values)
    columns = slice(BLOCK * plan.block_size, (BLOCK + 1) * plan.block_size)
    original = weight[:SHOWN, columns].numpy()
    codes = dense_codes(result.indices, result.values, plan.n_atoms)[BLOCK][:SHOWN].numpy()
    used = np.flatnonzero(np.abs(codes).max(axis=0))  # the atoms that the drawn rows use
    atoms = result.dictionary[BLOCK].numpy()[used]

    figure = Figure(figsize=(12, 3.9), layout="constrained")
    panels = figure.subplots(1, 5, width_ratios=(1, 2.1, 1, 1, 2))
    limit = float(np.abs(original).max())
    pictures = (
        (panels[0], original, limit, "weights W", f"{plan.block_size} columns"),
        (panels[1], codes[:, used], float(np.abs(codes).max()), "= codes S", f"{len(used)} of {plan.n_atoms} atoms"),
        (panels[2], atoms, float(np.abs(atoms).max()), "x dictionary D", f"{plan.block_size} columns"),
        (panels[3], again[:SHOWN, columns].numpy(), limit, "W again: SD", f"{plan.block_size} columns"),
    )
    for axes, values, most, title, below in pictures:
        axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(below, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    panels[0].set_ylabel(f"{SHOWN} of {plan.out_features} rows", fontsize=8)
    panels[1].set_xlabel(f"{len(used)} of {plan.n_atoms} atoms; {plan.n_nonzero} codes a row", fontsize=8)
    panels[2].set_ylabel("those atoms", fontsize=8)

    ratios = [1 / plans[preset].inverse_ratio for preset in PRESETS]
    ours = [relative_error(weight, reconstruct(one.dictionary, one.indices, one.values)) for one in made.values()]
    low_rank = [svd_error(weight, plans[preset].inverse_ratio)[1] for preset in PRESETS]
    axes = panels[4]
    axes.plot(ratios, low_rank, "o-", color="tab:gray", label="truncated SVD")
    axes.plot(ratios, ours, "o-", color="tab:blue", label="K-SVD")
    for ratio, one, two in zip(ratios, ours, low_rank, strict=True):
        axes.annotate(f"{one:.2f}", (ratio, one), (0, -12), textcoords="offset points", ha="center", fontsize=8)
        axes.annotate(f"{two:.2f}", (ratio, two), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set_ylim(0, 1.15 * max(low_rank))
    axes.margins(x=0.15)
    axes.set_xticks(ratios, [f"{ratio:.2f}" for ratio in ratios])
    axes.set_xlabel("compression by eq. 11", fontsize=8)
    axes.set_title("error, relative to W's norm", fontsize=10)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{NAME}, {plan.out_features} x {plan.in_features}, before any training", fontsize=9)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("how-it-works.png"))
    options = parser.parse_args()
    draw(read_weight(options.model), options.output)
