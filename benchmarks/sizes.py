"""How large a message of Llama-3.2-1B is, by codec: its shapes (from the public config) with random weights.

    python benchmarks/sizes.py
    python benchmarks/sizes.py fine-tune      (of small models that it trains: what `exact_delta` takes a round)

Every tensor is made, encoded and dropped before the next, so this takes little memory. "Eager" is what FLARE's filter
and the paper's table count: every tensor is encoded. "Policy" leaves norms exact, as `add_quantization` does. "Tied"
sends the embedding, which is the head as well, once. "Paper" is what NVIDIA published of FLARE's message quantization,
which counts the embedding twice.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator

import numpy as np
from measuring import command_line, machine, versions
from rich import box
from rich.console import Console
from rich.table import Table

from nvflare_rdma.codecs import get_codec, role_of

HIDDEN, WIDE, KEYS, LAYERS, WORDS = 2048, 8192, 512, 16, 128_256
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CODECS = (
    *("float16", "bfloat16", "float8_e4m3", "int8", "blockwise8", "float4", "normfloat4", "float4_dq"),
    *("normfloat4_dq", "normfloat4_e4m3", "int2", "ternary", "topk2_128", "topk2"),
)
PAPER = {"float16": 50.0, "bfloat16": 50.0, "blockwise8": 25.03, "float4": 14.06, "normfloat4": 14.06}
#: Percent, eager unless it says tied.
GOALS = {"float16": 50.0, "int8": 25.1, "normfloat4": 14.07, "normfloat4_dq": 12.95, "normfloat4_dq tied": 10.7}
#: Percent of bfloat16, of a round of a fine-tune in it.
EXACT_GOAL = 30.0


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield EMBEDDING, (WORDS, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "self_attn.k_proj.weight", (KEYS, HIDDEN)
        yield prefix + "self_attn.v_proj.weight", (KEYS, HIDDEN)
        yield prefix + "self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "mlp.gate_proj.weight", (WIDE, HIDDEN)
        yield prefix + "mlp.up_proj.weight", (WIDE, HIDDEN)
        yield prefix + "mlp.down_proj.weight", (HIDDEN, WIDE)
        yield prefix + "input_layernorm.weight", (HIDDEN,)
        yield prefix + "post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield HEAD, (WORDS, HIDDEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["codecs", "fine-tune"], default="codecs")
    for name, default in {"width": 128, "layers": 4, "before": 400, "rounds": 4, "steps": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="of the models that are fine-tuned")
    args = parser.parse_args()
    console = Console(width=120, color_system=None)
    console.print(f"$ {command_line()}\n{machine()}\n{versions('nvflare-rdma', 'numpy', 'torch')}", highlight=False)
    if args.what == "codecs":
        of_codecs(console)
    else:
        of_fine_tunes(console, args)


def of_fine_tunes(console: Console, args: argparse.Namespace) -> None:
    """A row for each model, way to keep its weights, and learning rate: a message a round."""
    import fine_tunes
    import torch

    torch.set_num_threads(1)
    table = Table(
        title=f"exact_delta: a round of {args.steps} steps, percent of bfloat16", title_justify="left", box=box.MARKDOWN
    )
    for heading in ("model", "weights", "rate"):
        table.add_column(heading)
    for heading in (*(f"round {i + 1}" for i in range(args.rounds)), "changed"):
        table.add_column(heading, justify="right")
    largest: dict[str, float] = {}
    for name in fine_tunes.MODELS:
        trained = fine_tunes.trained(name, args.width, args.layers, args.before)
        for stored in fine_tunes.STORED:
            for rate in fine_tunes.RATES:
                tuned = copy.deepcopy(trained)
                found = list(fine_tunes.rounds(tuned, stored, rate, args.rounds, args.steps))
                changed = sum(each.changed for each in found) / len(found)
                sizes = [each.of_bfloat16 for each in found]
                table.add_row(name, stored, f"{rate:.0e}", *map(percent, sizes), percent(changed))
                largest[stored] = max(largest.get(stored, 0.0), *sizes)
    console.print(table)
    for stored, share in largest.items():
        state = "met    " if 100 * share <= EXACT_GOAL else "NOT met"
        console.print(f"  {state}  {stored}: at most {percent(share)} (goal <= {EXACT_GOAL:.0f} %)")


def of_codecs(console: Console) -> None:
    random = np.random.default_rng(0)
    full, tied = 0, 0
    eager, policy, once = (dict.fromkeys(CODECS, 0) for _ in range(3))
    buffer = np.empty(get_codec("float16").encoded_nbytes(WORDS * HIDDEN), np.uint8)
    for name, shape in shapes():
        values = random.standard_normal(shape, np.float32)
        values *= np.float32(0.02)
        full += values.nbytes
        tied += values.nbytes if name != HEAD else 0
        exact = role_of(name, shape) in ("norm", "bias")
        for codec_name in CODECS:
            codec = get_codec(codec_name)
            size = codec.encode_into(values, buffer[: codec.encoded_nbytes(values.size)])
            eager[codec_name] += size
            policy[codec_name] += values.nbytes if exact else size
            once[codec_name] += 0 if name == HEAD else values.nbytes if exact else size
    table = Table(title=f"Llama-3.2-1B, fp32: {full / 2**20:,.2f} MiB", title_justify="left", box=box.MARKDOWN)
    table.add_column("codec")
    for heading in ("eager MiB", "eager", "paper", "policy", "policy, tied MiB", "policy, tied"):
        table.add_column(heading, justify="right")
    table.add_row(
        "none", f"{full / 2**20:,.2f}", "100 %", "100 %", "100 %", f"{tied / 2**20:,.2f}", percent(tied / full)
    )
    for name in CODECS:
        table.add_row(
            *(name, f"{eager[name] / 2**20:,.2f}", percent(eager[name] / full)),
            f"{PAPER[name]:.2f} %" if name in PAPER else "",
            *(percent(policy[name] / full), f"{once[name] / 2**20:,.2f}", percent(once[name] / full)),
        )
    console.print(table)
    for what, most in GOALS.items():
        name, is_tied = what.removesuffix(" tied"), what.endswith("tied")
        share = 100 * (once if is_tied else eager)[name] / full
        console.print(f"  {'met    ' if share <= most else 'NOT met'}  {what}: {share:.3f} % (goal <= {most} %)")


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


if __name__ == "__main__":
    main()
