"""Tiny random models of transformers' configuration classes, and inputs for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

NUM_ROWS = 5
NUM_TOKENS = 8
IMAGE_SIZE = 32

TINY: dict[str, Any] = {
    # Of these each configuration gets those that it knows.
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim"), 48),
    **dict.fromkeys(("hidden_dim", "n_inner", "d_inner", "dff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("image_size", "projection_dim"), IMAGE_SIZE),
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "patch_size": 8,
    "sliding_window": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
}


@dataclass(frozen=True)
class Setup:
    """One model: the type by which transformers knows its configuration, its head, and what is special."""

    kind: str
    auto: str
    config: dict[str, Any] = field(default_factory=dict)
    sub_configs: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (NUM_TOKENS,)
    """How many tokens the first call has, the second and so on, and then from the first again."""

    def make(self, name: str) -> nn.Module:
        """Return the model, always with the same random weights, and without dropout."""
        model_type = name.partition("/")[0]
        made = transformers.CONFIG_MAPPING[model_type]
        options = known_of(made) | self.config
        for each in self.sub_configs:
            options[each] = known_of(made.sub_configs[each]) | options.get(each, {})
        config = made(**options)
        silence(config)
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, self.auto).from_config(config)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    def inputs(self, number: int = 0) -> dict[str, Tensor]:
        """Return the keyword arguments of a call, of `NUM_ROWS` rows."""
        torch.manual_seed(1)
        length = self.lengths[number % len(self.lengths)]
        return {
            name: tensor[:, :length] if name in ("input_ids", "attention_mask") else tensor
            for name, tensor in INPUTS[self.kind]().items()
        }


def known_of(config_class: Any) -> dict[str, Any]:
    known = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map}
    return {name: value for name, value in TINY.items() if name in known}


def silence(config: Any) -> None:
    """Turn off what is drawn at random in train mode."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            silence(value)
        elif isinstance(value, float) and ("drop" in name or "pdrop" in name or "jitter" in name):
            setattr(config, name, 0.0)


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (NUM_ROWS, NUM_TOKENS))
    mask = torch.arange(NUM_TOKENS) < torch.tensor([[8], [5], [8], [3], [6]])
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def ids_only() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 99, (NUM_ROWS, NUM_TOKENS))}


def pixels(size: int = IMAGE_SIZE) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(NUM_ROWS, 3, size, size)}


INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "text": tokens,
    "ids": ids_only,
    "seq2seq": lambda: {**tokens(), "decoder_input_ids": torch.randint(3, 99, (NUM_ROWS, 6))},
    "image": pixels,
    "large image": lambda: pixels(64),
    # As many rows for each of two lanes: outputs hold a number for each pair of rows of a shard.
    "text and image": lambda: {name: rows[:4] for name, rows in (tokens() | pixels()).items()},
    "uneven text and image": lambda: tokens() | pixels(),
    "video": lambda: {"pixel_values": torch.randn(NUM_ROWS, 2, 3, IMAGE_SIZE, IMAGE_SIZE)},
    "waveform": lambda: {"input_values": torch.randn(NUM_ROWS, 400)},
    "spectrogram": lambda: {
        "input_features": torch.randn(NUM_ROWS, 80, 20),
        "decoder_input_ids": torch.randint(3, 99, (NUM_ROWS, 6)),
    },
    "frames": lambda: {"input_values": torch.randn(NUM_ROWS, 32, 16)},
    "series": lambda: {"past_values": torch.randn(NUM_ROWS, 16, 2)},
}


def encoder(**config: Any) -> Setup:
    return Setup("text", "AutoModel", config)


def causal(**config: Any) -> Setup:
    return Setup("text", "AutoModelForCausalLM", config)


def seq2seq(**config: Any) -> Setup:
    return Setup("seq2seq", "AutoModelForSeq2SeqLM", config)


def image(**config: Any) -> Setup:
    return Setup("image", "AutoModel", config)


def stages(**config: Any) -> Setup:
    return image(**{"hidden_sizes": [8, 16], "depths": [1, 1], **config})


def waveform(**config: Any) -> Setup:
    convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4)}
    return Setup(
        "waveform",
        "AutoModel",
        {
            **convolutions,
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
            **config,
        },
    )


def pair(kind: str = "text and image", **config: Any) -> Setup:
    return Setup(kind, "AutoModel", config, ("text_config", "vision_config"))


def many(make: Callable[[], Setup], names: str) -> dict[str, Setup]:
    """Return a setup for each name, none of them special."""
    return {name: make() for name in names.split()}


SETUPS: dict[str, Setup] = {
    # Encoders.
    **many(
        encoder,
        """
        albert bert bert-generation camembert canine convbert data2vec-text deberta deberta-v2
        distilbert electra ernie esm eurobert flaubert fnet ibert layoutlm longformer megatron-bert
        modernbert mpnet mra nomic_bert nystromformer rembert roberta roberta-prelayernorm roc_bert
        roformer splinter squeezebert xlm xlm-roberta xlm-roberta-xl yoso big_bird mobilebert
        """,
    ),
    # Decoders.
    **many(
        causal,
        """
        arcee biogpt bitnet bloom cohere cohere2 ctrl diffllama doge exaone4 falcon falcon_mamba
        gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neox gpt_oss granite granitemoe
        helium jetmoe llama lfm2 mamba mistral mixtral minimax mpt nemotron olmo olmo2 olmo3 olmoe
        openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe rwkv seed_oss
        smollm3 stablelm starcoder2 xglm
        """,
    ),
    "xlnet": encoder(use_mems_eval=False),
    "xmod": encoder(default_language="en_XX"),
    "llama/dynamic rope": Setup(
        "text",
        "AutoModelForCausalLM",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            "max_position_embeddings": 4,
        },
        lengths=(8, 3),
    ),
    # Its forward scales its own weights when the mode has changed.
    "rwkv/rescaled": causal(rescale_every=1),
    "codegen": causal(rotary_dim=4),
    "gptj": causal(rotary_dim=4),
    "deepseek_v3": causal(num_key_value_heads=4),
    "jamba": causal(attn_layer_period=2, attn_layer_offset=1),
    "qwen3_next": causal(layer_types=["linear_attention", "full_attention"]),
    "recurrent_gemma": causal(num_hidden_layers=3, lru_width=32),
    "mamba2": causal(num_heads=8, n_groups=1, chunk_size=8, state_size=8),
    # Encoders with decoders.
    **many(
        seq2seq,
        """
        bart blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe
        pegasus pegasus_x plbart prophetnet switch_transformers t5 umt5
        """,
    ),
    # Images.
    **many(
        image,
        """
        beit deit dinov2 dinov2_with_registers data2vec-vision ijepa vit vit_msn siglip_vision_model
        clip_vision_model mobilenet_v1 mobilenet_v2
        """,
    ),
    **many(stages, "convnext convnextv2 regnet resnet swiftformer focalnet"),
    "vivit": Setup("video", "AutoModel", {"num_frames": 2, "tubelet_size": [2, 8, 8]}),
    "videomae": Setup("video", "AutoModel", {"num_frames": 2}),
    "timesformer": Setup("video", "AutoModel", {"num_frames": 2}),
    "yolos": image(image_size=[32, 32]),
    # Sound.
    **many(waveform, "wav2vec2 hubert wavlm unispeech unispeech-sat sew data2vec-audio wav2vec2-conformer"),
    "whisper": Setup(
        "spectrogram", "AutoModelForSpeechSeq2Seq", {"max_source_positions": 10, "num_mel_bins": 80}
    ),
    "speech_to_text": Setup(
        "spectrogram", "AutoModelForSpeechSeq2Seq", {"max_source_positions": 10, "input_feat_per_channel": 20}
    ),
    "audio-spectrogram-transformer": Setup("frames", "AutoModel", {"max_length": 32, "num_mel_bins": 16}),
    # Two kinds of input at once.
    **many(pair, "clip siglip chinese_clip altclip blip clipseg owlvit metaclip_2"),
    "clip/uneven": pair("uneven text and image"),
    # Series.
    "patchtst": Setup(
        "series", "AutoModel", {"num_input_channels": 2, "context_length": 16, "patch_length": 4}
    ),
    "patchtsmixer": Setup(
        "series", "AutoModel", {"num_input_channels": 2, "context_length": 16, "patch_length": 4}
    ),
}
