"""What a folder of sentence-transformers says: its modules, prompts and limits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import JobUsageError, ModelLoadError
from .folders import read_json, unreadable
from .pooling import POOLING_MODES, LayerNorm, Normalize, Projection, modes_of
from .weights import load_weights

_SPARSE = ("SpladePooling", "MLMTransformer", "SparseAutoEncoder", "SparseStaticEmbedding", "CSRSparsity")

# Settings of the encoder that change what is computed, and that this is not for.
_UNKNOWN = ("query_length", "document_length", "query_expansion", "processing_kwargs")


@dataclasses.dataclass(frozen=True)
class SentenceFolder:
    """The settings of a folder of sentence-transformers, or the defaults for a bare encoder.

    Attributes:
        root: the folder.
        modules: class and folder of each module, in order; empty for a bare encoder.
        settings: of the whole model.
        encoder_settings: of its encoder.
    """

    root: Path
    modules: tuple[tuple[str, Path], ...]
    settings: dict[str, Any]
    encoder_settings: dict[str, Any]

    @classmethod
    def read(cls, root: Path) -> SentenceFolder:
        """Read the settings.

        Raises:
            ModelLoadError: they are damaged.
        """
        modules = _modules(root)
        settings = read_json(root / "config_sentence_transformers.json")
        encoder = modules[0][1] if modules else root
        # The name has the type of the encoder in it, sentence_bert_config.json for most.
        paths = [*encoder.glob("sentence_*_config.json"), encoder / "sentence_bert_config.json"]
        return cls(root, modules, settings, read_json(paths[0]))

    @property
    def encoder(self) -> Path:
        """The folder of the encoder and its tokenizer."""
        return self.modules[0][1] if self.modules else self.root

    @property
    def max_seq_length(self) -> int | None:
        """Tokens that a text is cut to, where the folder says."""
        return self.encoder_settings.get("max_seq_length")

    @property
    def pooling_modes(self) -> list[str]:
        """How the states of tokens are put together."""
        return modes_of(self._pooling)

    @property
    def pools_prompt(self) -> bool:
        """Whether the tokens of a prompt are pooled like all others."""
        return bool(self._pooling.get("include_prompt", True))

    @property
    def _pooling(self) -> dict[str, Any]:
        paths = [path for kind, path in self.modules if kind == "Pooling"]
        config: dict[str, Any] = read_json((paths or [self.root / "1_Pooling"])[0] / "config.json")
        return config

    def find_prompt(self, prompt: str | None, name: str | None) -> str:
        """Return the text before every text: the one given, the one named, or the folder's default.

        Raises:
            JobUsageError: the folder has no prompt of that name.
        """
        prompts = self.settings.get("prompts") or {}
        if name is not None and name not in prompts:
            known = ", ".join(prompts) or "none"
            raise JobUsageError(
                f"--prompt-name {name}: {self.root} has no such prompt",
                f"It has {known}; --prompt takes a text of your own.",
            )
        if prompt is not None:
            return prompt
        return prompts.get(name or self.settings.get("default_prompt_name")) or ""

    def load_layers(self, width: int, *, allow_pickle: bool) -> tuple[nn.Module, int]:
        """Load what follows the pooling.

        Args:
            width: entries of the pooled vectors.
            allow_pickle: whether weights may be a pickle.

        Returns:
            The layers, vectors of length one for a bare encoder, and the width of what they give.
        """
        if not self.modules:
            return Normalize(), width
        layers: list[nn.Module] = []
        for kind, path in self.modules[2:]:
            layer = self._make_layer(kind, path)
            if layer.state_dict():
                safe = path / "model.safetensors"
                load_weights(
                    layer, safe if safe.exists() else path / "pytorch_model.bin", allow_pickle=allow_pickle
                )
            width = layer.linear.out_features if isinstance(layer, Projection) else width
            layers.append(layer)
        return nn.Sequential(*layers), width

    def _make_layer(self, kind: str, path: Path) -> nn.Module:
        config = read_json(path / "config.json")
        named = {config.get("module_input_name"), config.get("module_output_name")}
        if named - {None, "sentence_embedding"}:
            raise self._unlike(f"has a module {kind} that works on {', '.join(map(str, named))}")
        try:
            if kind == "Dense":
                return Projection(
                    config["in_features"],
                    config["out_features"],
                    bias=config.get("bias", True),
                    activation=self.activation(config.get("activation_function") or "torch.nn.Tanh"),
                    residual=config.get("use_residual", False),
                )
            return LayerNorm(config["dimension"]) if kind == "LayerNorm" else _PLAIN[kind]()
        except (LookupError, TypeError) as error:
            raise unreadable(path / "config.json", f"it lacks {error}") from error

    def activation(self, name: str) -> nn.Module:
        """Make the activation that the folder names.

        Raises:
            ModelLoadError: it is none of torch's own modules.
        """
        kind = getattr(nn, name.rpartition(".")[2], None)
        if not (name.startswith("torch.nn.") and isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise self._unlike(f"has the activation {name}, which is none of torch's")
        return kind()

    def check_dense(self) -> None:
        """Check that the folder is for one dense vector for each text, made of known parts.

        Raises:
            ModelLoadError: with what it has or sets beside these.
        """
        kinds = [kind for kind, _ in self.modules]
        if self.settings.get("model_type") == "SparseEncoder" or set(kinds) & set(_SPARSE):
            raise self._unlike("is sparse (SPLADE), and --task embed makes dense vectors")
        if self.settings.get("model_type") == "MultiVectorEncoder":
            raise self._unlike("gives a vector for every token, and --task embed makes one for each text")
        if self.settings.get("model_type") == "CrossEncoder":
            raise ModelLoadError(f"The model in {self.root} compares pairs of texts", "Give --task rerank.")
        for kind, wanted in zip(kinds, ("Transformer", "Pooling"), strict=False):
            if kind != wanted:
                raise self._unlike(f"has a module {kind}, where --task embed runs a {wanted}")
        if len(kinds) == 1:
            raise self._unlike("has no pooling")
        for kind in kinds[2:]:
            if kind not in ("Dense", "LayerNorm", *_PLAIN):
                raise self._unlike(f"has a module {kind}, which --task embed does not run")
        for mode in self.pooling_modes:
            if mode not in POOLING_MODES:
                raise self._unlike(f"pools by {mode}, which --task embed does not know")
        if self.encoder_settings.get("transformer_task", "feature-extraction") != "feature-extraction":
            raise self._unlike(f"has an encoder for {self.encoder_settings['transformer_task']}")
        for name in _UNKNOWN:
            if self.encoder_settings.get(name):
                raise self._unlike(f"sets {name}, which --task embed does not obey")

    def _unlike(self, what: str) -> ModelLoadError:
        return ModelLoadError(
            f"The model in {self.root} {what}",
            "Write a factory for it and name that as package.module:name.",
        )


_PLAIN = {"Normalize": Normalize, "Dropout": nn.Identity}


def _modules(root: Path) -> tuple[tuple[str, Path], ...]:
    """Return class and folder of every module that sentence-transformers would run."""
    path = root / "modules.json"
    try:
        found = [(entry["type"], entry["path"]) for entry in read_json(path, list)]
        for kind, folder in found:
            if not kind.startswith("sentence_transformers."):
                raise ModelLoadError(
                    f"The model in {root} has a module {kind} with code of its own",
                    "Write a factory for it and name that as package.module:name.",
                )
            if not (root / folder).resolve().is_relative_to(root.resolve()):
                raise LookupError(f"the module {folder} lies outside of the folder")
        return tuple((kind.rpartition(".")[2], root / folder) for kind, folder in found)
    except (LookupError, TypeError, AttributeError) as error:
        raise unreadable(path, f"it holds no list of modules: {error}") from error
