"""GPT-2 (Radford et al., 2019) with LoRA adapters (Hu et al., 2021): transformers' model, and PEFT's adapters.

A site has the whole model, and trains the adapters. The server has `Adapters` and nothing else: it never needs the base
model, nor the memory for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

TARGETS = ["c_attn", "c_proj", "c_fc"]
#: Beside weights, files of GPT-2 have masks.
_MASKS = (".attn.bias", ".attn.masked_bias")


def config_for(width: int, layers: int, vocab: int, context: int = 1024) -> GPT2Config:
    """GPT-2 of these sizes, without dropout. Heads are 64 wide, as in all of OpenAI's."""
    sizes = {"n_embd": width, "n_layer": layers, "n_head": width // 64, "vocab_size": vocab, "n_positions": context}
    tokens = {"bos_token_id": None, "eos_token_id": None}  # nothing is generated, and a small vocabulary lacks them
    return GPT2Config(**sizes, **tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def sizes_of(checkpoint: Path) -> dict[str, int]:
    """The sizes of the GPT-2 in a safetensors file, as `config_for` takes them.

    Raises:
        ValueError: it has none in it.
    """
    with safe_open(checkpoint, "pt") as file:
        shapes = {_bare(name): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    layers = {name.split(".")[1] for name in shapes if name.startswith("h.")}
    if not layers or not {"wte.weight", "wpe.weight"} <= set(shapes):
        raise ValueError(
            f"{checkpoint} has no GPT-2 in it: wte.weight, wpe.weight or the layers h.0, h.1 ... are missing"
        )
    (vocab, width), (context, _) = shapes["wte.weight"], shapes["wpe.weight"]
    return {"width": width, "layers": len(layers), "vocab": vocab, "context": context}


def base_model(sizes: dict[str, int], seed: int, checkpoint: Path | None = None) -> GPT2LMHeadModel:
    """The model that is not trained: the weights of a safetensors file, or random ones, which are the same at all sites
    that have the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config_for(**sizes))
    if checkpoint is not None:
        weights = {_bare(name): tensor for name, tensor in load_file(checkpoint).items()}
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith(_MASKS)}
        weights.pop("lm_head.weight", None)  # it is wte.weight
        model.transformer.load_state_dict(weights)
    return model


def with_adapters(model: GPT2LMHeadModel, rank: int, **options: Any) -> PeftModel:
    """`model`, whose own weights are frozen, with adapters of `rank` at all of its layers' matrices."""
    adapters = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=TARGETS, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    made = get_peft_model(model, adapters, **options)
    made.peft_config["default"].base_model_name_or_path = None  # there is nothing to look up on a hub
    return made


class Adapters(nn.Module):
    """The adapters alone, with PEFT's names for them: what the server begins with, adds up and saves.

    Args:
        rank: of the adapters.
        seed: of their initial weights.
        sizes: those of the model, as `config_for` takes them.
    """

    def __init__(self, rank: int, seed: int, **sizes: int) -> None:
        super().__init__()
        with torch.device("meta"):  # shapes are all that is needed of the model
            model = with_adapters(GPT2LMHeadModel(config_for(**sizes)), rank, low_cpu_mem_usage=True)
        generator = torch.Generator().manual_seed(seed)
        for name, shape in ((name, each.shape) for name, each in get_peft_model_state_dict(model).items()):
            weight = torch.zeros(shape)  # B is zero, so that the model is the base to begin with
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator)  # as PEFT does
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(weight))


def full_size(sizes: dict[str, int]) -> int:
    """How many parameters the base model has."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT2LMHeadModel(config_for(**sizes)).parameters())


def tokens_of(text: Tensor) -> Tensor:
    """A token for each byte of `text`. The first 256 tokens of GPT-2 are the single bytes, printable ones first."""
    return _TOKEN_OF_BYTE[text.long()]


def _token_of_byte() -> Tensor:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = [*printable, *(byte for byte in range(256) if byte not in printable)]
    return torch.tensor(order).argsort()


def _bare(name: str) -> str:
    return name.removeprefix("transformer.")


_TOKEN_OF_BYTE = _token_of_byte()
