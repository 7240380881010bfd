"""Architectures of Hugging Face transformers: two layers, a width of 32 to 64, no checkpoint, no network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.zoo.entry import Entry, Example, generator, noise, randomise, seeded

VOCABULARY = 99
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2}
GEMMA: dict[str, Any] = {**GROUPED, "head_dim": 8}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
SPEECH: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
}
EAGER = {"attn_implementation": "eager"}


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator(batch, length))


def _mask(batch: int, length: int) -> torch.Tensor:
    """The first row is whole, each later one is a token shorter: no row is empty."""
    ends = length - torch.arange(batch).clamp(max=length // 2)
    return (torch.arange(length)[None, :] < ends[:, None]).long()


def tokens(batch: int, length: int, **more: Any) -> Example:
    return (), {"input_ids": _ids(batch, length), **more}


def positional(batch: int, length: int) -> Example:
    return (_ids(batch, length),), {}


def masked(batch: int, length: int, **more: Any) -> Example:
    return (), {"input_ids": _ids(batch, length), "attention_mask": _mask(batch, length), **more}


def decoding(batch: int, length: int) -> Example:
    return tokens(batch, length, use_cache=False)


def masked_decoding(batch: int, length: int) -> Example:
    return masked(batch, length, use_cache=False)


def pair(batch: int, length: int) -> Example:
    """An encoder's and a decoder's tokens, of different lengths."""
    return tokens(batch, length, decoder_input_ids=_ids(batch, length - 3), use_cache=False)


def masked_pair(batch: int, length: int) -> Example:
    return masked(batch, length, decoder_input_ids=_ids(batch, length - 3), use_cache=False)


def image(batch: int, length: int, *, channels: int = 3) -> Example:
    """`length` is the side of the image."""
    return (), {"pixel_values": noise(batch, channels, length, length)}


def wave(batch: int, length: int) -> Example:
    """`length` counts samples."""
    return (), {"input_values": noise(batch, length)}


def mel(batch: int, length: int, *, bins: int) -> Example:
    """Log-mel frames, (batch, bins, length)."""
    return (), {"input_features": noise(batch, bins, length)}


def whisper(batch: int, length: int) -> Example:
    (), features = mel(batch, 32, bins=16)
    return (), {**features, "decoder_input_ids": _ids(batch, length), "use_cache": False}


def image_and_text(batch: int, length: int) -> Example:
    return masked(batch, length, pixel_values=noise(batch, 3, 32, 32))


def mae(batch: int, length: int) -> Example:
    """The masking noise is an input: nothing random inside."""
    return (), {"pixel_values": noise(batch, 3, length, length), "noise": noise(batch, (length // 8) ** 2)}


def _build(name: str, model: str, options: dict[str, Any], example: Callable[[], Example]) -> nn.Module:
    import transformers

    with seeded(name):
        kind = getattr(transformers, model)
        attention = options.get("attn_implementation")
        config = kind.config_class(**{k: v for k, v in options.items() if k != "attn_implementation"})
        built = kind._from_config(config, attn_implementation=attention) if attention else kind(config)
        return randomise(built.eval(), example())


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}


def _row(
    name: str,
    model: str,
    example: Callable[[int, int], Example],
    tags: str,
    options: dict[str, Any],
    **more: Any,
) -> Entry:
    defaults: dict[str, Any] = {"vary_length": "text" in tags, "length": 32 if "vision" in tags else 8}
    fields = defaults | more
    build = partial(_build, name, model, options, partial(example, 16, fields["length"]))
    return Entry(name, build, example, frozenset(tags.split()), **fields)


_SCAN: dict[str, Any] = {"free_length": False, "reason": "a Python loop over the tokens is unrolled"}
ENCODER, DECODER, ENCDEC = "text encoder", "text decoder", "text encdec"
# fmt: off
_ROWS: tuple[Entry, ...] = (
    # Text, decoders with LayerNorm
    _row("gpt2", "GPT2LMHeadModel", decoding, DECODER, TEXT),
    _row("gpt2-eager", "GPT2LMHeadModel", masked_decoding, DECODER, TEXT | EAGER),
    _row("gpt-neo", "GPTNeoForCausalLM", decoding, DECODER,
         TEXT | {"num_layers": 2, "num_heads": 4, "window_size": 4,
                 "attention_types": [[["global", "local"], 1]]}),
    _row("gpt-neox", "GPTNeoXForCausalLM", masked_decoding, DECODER, TEXT),
    _row("gpt-neox-sequential", "GPTNeoXForCausalLM", decoding, DECODER,
         TEXT | {"use_parallel_residual": False}),
    _row("gpt-j", "GPTJForCausalLM", decoding, DECODER, TEXT | {"rotary_dim": 4}),
    _row("gpt-bigcode", "GPTBigCodeForCausalLM", decoding, DECODER, TEXT),
    _row("openai-gpt", "OpenAIGPTLMHeadModel", positional, DECODER, TEXT),
    _row("opt", "OPTForCausalLM", masked_decoding, DECODER,
         TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    _row("opt-350m", "OPTForCausalLM", decoding, DECODER,
         TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    _row("phi", "PhiForCausalLM", masked_decoding, DECODER, TEXT),
    _row("phi-qk", "PhiForCausalLM", decoding, DECODER, TEXT | {"qk_layernorm": True}),
    _row("bloom", "BloomForCausalLM", masked_decoding, DECODER, TEXT | {"n_layer": 2, "n_head": 4}),
    _row("falcon", "FalconForCausalLM", masked_decoding, DECODER, TEXT),
    _row("falcon-new", "FalconForCausalLM", decoding, DECODER,
         TEXT | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    _row("mpt", "MptForCausalLM", decoding, DECODER,
         TEXT | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    _row("codegen", "CodeGenForCausalLM", decoding, DECODER, TEXT | {"rotary_dim": 4, "n_ctx": 64}),
    _row("starcoder2", "Starcoder2ForCausalLM", decoding, DECODER, GROUPED),
    _row("stablelm", "StableLmForCausalLM", decoding, DECODER, GROUPED),
    _row("stablelm-qk", "StableLmForCausalLM", decoding, DECODER,
         GROUPED | {"qk_layernorm": True, "use_parallel_residual": True}),
    _row("cohere", "CohereForCausalLM", decoding, DECODER, GROUPED | {"use_qk_norm": True}),
    _row("olmo", "OlmoForCausalLM", decoding, DECODER, GROUPED),
    _row("xglm", "XGLMForCausalLM", decoding, DECODER,
         TEXT | {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
    _row("biogpt", "BioGptForCausalLM", masked_decoding, DECODER, TEXT),
    _row("persimmon", "PersimmonForCausalLM", decoding, DECODER, TEXT),
    _row("nemotron", "NemotronForCausalLM", decoding, DECODER, GROUPED | {"head_dim": 8}),
    _row("ctrl", "CTRLLMHeadModel", decoding, DECODER, TEXT | {"dff": 48}),
    # Text, decoders with RMSNorm
    _row("llama", "LlamaForCausalLM", masked_decoding, DECODER, GROUPED),
    _row("llama-eager", "LlamaForCausalLM", decoding, DECODER, GROUPED | EAGER),
    _row("mistral", "MistralForCausalLM", decoding, DECODER, GROUPED | {"sliding_window": 4}),
    _row("mixtral", "MixtralForCausalLM", decoding, DECODER, GROUPED | {"num_local_experts": 4}),
    _row("qwen2", "Qwen2ForCausalLM", decoding, DECODER, GROUPED),
    _row("qwen3", "Qwen3ForCausalLM", decoding, DECODER, GROUPED | {"head_dim": 8}),
    _row("gemma", "GemmaForCausalLM", decoding, DECODER, GEMMA),
    _row("gemma2", "Gemma2ForCausalLM", decoding, DECODER, GEMMA | {"sliding_window": 4}),
    _row("gemma2-eager", "Gemma2ForCausalLM", decoding, DECODER, GEMMA | {"sliding_window": 4} | EAGER),
    _row("gemma3", "Gemma3ForCausalLM", decoding, DECODER, GEMMA | {"sliding_window": 4}),
    _row("olmo2", "Olmo2ForCausalLM", decoding, DECODER, GROUPED),
    _row("phi3", "Phi3ForCausalLM", decoding, DECODER, GROUPED),
    _row("granite", "GraniteForCausalLM", decoding, DECODER, GROUPED | {"residual_multiplier": 0.5}),
    _row("glm", "GlmForCausalLM", decoding, DECODER, GROUPED | {"head_dim": 8}),
    _row("glm4", "Glm4ForCausalLM", decoding, DECODER, GROUPED | {"head_dim": 8}),
    _row("helium", "HeliumForCausalLM", decoding, DECODER, GROUPED | {"head_dim": 8}),
    _row("smollm3", "SmolLM3ForCausalLM", decoding, DECODER, GROUPED),
    _row("diffllama", "DiffLlamaForCausalLM", decoding, DECODER, GROUPED),
    _row("mamba", "MambaForCausalLM", decoding, DECODER, TEXT | {"state_size": 4, "time_step_rank": 4},
         **_SCAN),
    _row("recurrent-gemma", "RecurrentGemmaForCausalLM", decoding, DECODER,
         GEMMA | {"num_hidden_layers": 3, "lru_width": 32}, **_SCAN),
    _row("cohere2", "Cohere2ForCausalLM", decoding, DECODER, GROUPED | {"sliding_window": 4}),
    _row("olmoe", "OlmoeForCausalLM", decoding, DECODER,
         GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    _row("exaone4", "Exaone4ForCausalLM", decoding, DECODER, GROUPED | {"sliding_window": 4}),
    _row("nanochat", "NanoChatForCausalLM", decoding, DECODER, GROUPED),
    _row("bitnet", "BitNetForCausalLM", decoding, DECODER, GROUPED),
    _row("gpt-oss", "GptOssForCausalLM", decoding, DECODER,
         GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    _row("deepseek-v3", "DeepseekV3ForCausalLM", decoding, DECODER,
         GROUPED | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                    "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 2,
                    "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                    "first_k_dense_replace": 1}),
    _row("mamba2", "Mamba2ForCausalLM", decoding, DECODER,
         TEXT | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
         free_length=False, reason="the padding to whole chunks is a Python int of the length"),
    _row("falcon-mamba", "FalconMambaForCausalLM", decoding, DECODER,
         TEXT | {"state_size": 4, "time_step_rank": 4}, **_SCAN),
    _row("jamba", "JambaForCausalLM", decoding, DECODER,
         GROUPED | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4,
                    "mamba_dt_rank": 4, "use_mamba_kernels": False}, **_SCAN),
    _row("rwkv", "RwkvForCausalLM", decoding, DECODER, TEXT, **_SCAN),
    # Text, encoders
    _row("bert", "BertModel", masked, ENCODER, TEXT),
    _row("bert-mlm-eager", "BertForMaskedLM", tokens, ENCODER, TEXT | EAGER),
    _row("roberta", "RobertaForSequenceClassification", masked, ENCODER, TEXT),
    _row("roberta-prelayernorm", "RobertaPreLayerNormModel", tokens, ENCODER, TEXT),
    _row("distilbert", "DistilBertForMaskedLM", masked, ENCODER, TEXT | {"dim": 32, "hidden_dim": 48}),
    _row("albert", "AlbertForMaskedLM", masked, ENCODER, TEXT | {"embedding_size": 16}),
    _row("electra", "ElectraForPreTraining", masked, ENCODER, TEXT | {"embedding_size": 16}),
    _row("deberta", "DebertaModel", masked, ENCODER,
         TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}),
    _row("deberta-v2", "DebertaV2Model", masked, ENCODER,
         TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16,
                 "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3}),
    _row("mpnet", "MPNetModel", masked, ENCODER, TEXT),
    _row("mobilebert", "MobileBertModel", tokens, ENCODER,
         TEXT | {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}),
    _row("squeezebert", "SqueezeBertModel", masked, ENCODER, TEXT | {"embedding_size": 32}),
    _row("camembert", "CamembertModel", tokens, ENCODER, TEXT),
    _row("ernie", "ErnieModel", tokens, ENCODER, TEXT),
    _row("convbert", "ConvBertModel", tokens, ENCODER, TEXT | {"embedding_size": 32}),
    _row("roformer", "RoFormerModel", tokens, ENCODER, TEXT | {"embedding_size": 32}),
    _row("fnet", "FNetModel", tokens, ENCODER, TEXT),
    _row("nystromformer", "NystromformerModel", tokens, ENCODER,
         TEXT | {"num_landmarks": 8, "segment_means_seq_len": 8}),
    _row("xlm-roberta-xl", "XLMRobertaXLModel", masked, ENCODER, TEXT),
    _row("xlnet", "XLNetModel", tokens, ENCODER,
         _without(TEXT, "max_position_embeddings") | {"d_head": 8, "d_inner": 48}),
    _row("canine", "CanineModel", tokens, ENCODER, TEXT | {"num_hash_buckets": 64},
         free_length=False, reason="4 * (n // 4) + n % 4 is not seen to be n"),
    _row("modernbert", "ModernBertModel", masked, ENCODER, TEXT | {"cls_token_id": 1, "sep_token_id": 2}),
    _row("nomic-bert", "NomicBertModel", masked, ENCODER, TEXT),
    _row("esm", "EsmModel", masked, ENCODER, TEXT | {"mask_token_id": 4, "emb_layer_norm_before": True}),
    _row("clip-text", "CLIPTextModel", masked, ENCODER, TEXT),
    _row("siglip-text", "SiglipTextModel", tokens, ENCODER, TEXT | {"projection_size": 32}),
    _row("longformer", "LongformerModel", masked, ENCODER, TEXT | {"attention_window": 4},
         exportable=False, reason="forward branches on is_global_attn.any(), a value of the mask"),
    _row("big-bird", "BigBirdModel", masked, ENCODER, TEXT | {"attention_type": "original_full"}),
    _row("funnel", "FunnelBaseModel", tokens, ENCODER,
         _without(TEXT, "num_hidden_layers") | {"block_sizes": [1, 1], "d_head": 8, "d_inner": 48},
         free_length=False, reason="relative positions are collected in a Python loop"),
    _row("rembert", "RemBertModel", tokens, ENCODER,
         TEXT | {"input_embedding_size": 16, "output_embedding_size": 16}),
    _row("megatron-bert", "MegatronBertModel", tokens, ENCODER, TEXT),
    _row("ibert", "IBertModel", tokens, ENCODER, TEXT),
    _row("layoutlm", "LayoutLMModel", tokens, ENCODER, TEXT),
    _row("perceiver-masked-lm", "PerceiverForMaskedLM", positional, ENCODER,
         {"vocab_size": VOCABULARY, "num_latents": 6, "d_latents": 32, "d_model": 16,
          "num_self_attends_per_block": 2,
          "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "qk_channels": 16, "v_channels": 32,
          "max_position_embeddings": 16}, length=16, vary_length=False),
    # Text, encoder-decoders
    _row("t5", "T5ForConditionalGeneration", masked_pair, ENCDEC, T5),
    _row("t5-encoder", "T5EncoderModel", masked, ENCODER, T5),
    _row("mt5", "MT5ForConditionalGeneration", pair, ENCDEC, T5 | {"feed_forward_proj": "gated-gelu"}),
    _row("bart", "BartForConditionalGeneration", masked_pair, ENCDEC, SEQ2SEQ),
    _row("mbart", "MBartForConditionalGeneration", pair, ENCDEC, SEQ2SEQ),
    _row("pegasus", "PegasusForConditionalGeneration", pair, ENCDEC, SEQ2SEQ),
    _row("marian", "MarianMTModel", pair, ENCDEC, SEQ2SEQ),
    _row("blenderbot", "BlenderbotForConditionalGeneration", pair, ENCDEC, SEQ2SEQ),
    _row("m2m-100", "M2M100Model", pair, ENCDEC, SEQ2SEQ),
    _row("prophetnet", "ProphetNetModel", pair, ENCDEC,
         _without(TEXT, "num_hidden_layers")
         | {"num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}),
    # Vision transformers
    _row("vit", "ViTForImageClassification", image, "vision encoder", VIT),
    _row("vit-eager", "ViTModel", image, "vision encoder", VIT | EAGER),
    _row("deit", "DeiTForImageClassification", image, "vision encoder", VIT),
    _row("deit-distilled", "DeiTForImageClassificationWithTeacher", image, "vision encoder", VIT),
    _row("clip-vision", "CLIPVisionModelWithProjection", image, "vision encoder", VIT),
    _row("clip", "CLIPModel", image_and_text, "text vision encoder",
         {"text_config": TEXT, "vision_config": VIT, "projection_dim": 16}),
    _row("siglip-vision", "SiglipVisionModel", image, "vision encoder", VIT),
    _row("beit", "BeitForImageClassification", image, "vision encoder",
         VIT | {"use_relative_position_bias": True, "use_absolute_position_embeddings": True}),
    _row("data2vec-vision", "Data2VecVisionModel", image, "vision encoder",
         VIT | {"use_shared_relative_position_bias": True}),
    _row("dinov2", "Dinov2Model", image, "vision encoder", VIT),
    _row("dinov2-registers", "Dinov2WithRegistersModel", image, "vision encoder", VIT),
    _row("dinov3", "DINOv3ViTModel", image, "vision encoder", VIT),
    _row("vit-mae", "ViTMAEForPreTraining", mae, "vision encoder",
         VIT | {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
                "decoder_intermediate_size": 32}),
    _row("vit-msn", "ViTMSNModel", image, "vision encoder", VIT),
    _row("ijepa", "IJepaModel", image, "vision encoder", VIT),
    _row("audio-spectrogram", "ASTModel",
         lambda batch, length: ((), {"input_values": noise(batch, length, 32)}), "audio encoder",
         VIT | {"max_length": 64, "num_mel_bins": 32, "frequency_stride": 8, "time_stride": 8}, length=64),
    _row("swin", "SwinForImageClassification", image, "vision encoder",
         {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
          "window_size": 4}, slow_dynamic=True),
    _row("swinv2", "Swinv2Model", image, "vision encoder",
         {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
          "window_size": 4}, slow_dynamic=True),
    _row("segformer", "SegformerForSemanticSegmentation", image, "vision encoder",
         {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
          "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
          "decoder_hidden_size": 32, "num_labels": 5}, length=64),
    _row("pvt", "PvtModel", image, "vision encoder",
         {"image_size": 64, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1],
          "hidden_sizes": [16, 32], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1, 2],
          "mlp_ratios": [2, 2]}, length=64),
    _row("pvt-v2", "PvtV2Model", image, "vision encoder",
         {"image_size": 64, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1],
          "hidden_sizes": [16, 32], "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2],
          "mlp_ratios": [2, 2]}, length=64),
    _row("glpn", "GLPNModel", image, "vision encoder",
         {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
          "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
          length=64),
    _row("yolos", "YolosModel", image, "vision encoder",
         VIT | {"image_size": [32, 32], "num_detection_tokens": 4}),
    _row("hiera", "HieraModel", image, "vision encoder",
         {"image_size": [32, 32], "patch_size": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3],
          "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "query_stride": [2, 2], "num_query_pool": 1,
          "masked_unit_size": [4, 4], "masked_unit_attention": [True, False], "mlp_ratio": 2.0},
          slow_dynamic=True),
    _row("vitdet", "VitDetModel", image, "vision encoder",
         VIT | {"window_block_indices": [0], "window_size": 2, "pretrain_image_size": 32,
                "use_relative_position_embeddings": True, "residual_block_indices": [1]}, slow_dynamic=True),
    _row("mobilevit", "MobileViTModel", image, "vision cnn encoder",
         {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
          "num_attention_heads": 4}, length=64, slow_dynamic=True),
    _row("poolformer", "PoolFormerForImageClassification", image, "vision encoder",
         {"depths": [1, 1], "hidden_sizes": [16, 32], "num_encoder_blocks": 2, "patch_sizes": [7, 3],
          "strides": [4, 2], "padding": [2, 1], "mlp_ratio": 2.0}),
    _row("levit", "LevitForImageClassificationWithTeacher", image, "vision cnn encoder",
         {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1,
                                                                                                       1],
          "key_dim": [8, 8, 8]}, length=64),
    _row("focalnet", "FocalNetModel", image, "vision cnn encoder",
         {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32],
          "focal_levels": [2, 2], "focal_windows": [3, 3]},
         vary_length=True),
    _row("cvt", "CvtModel", image, "vision cnn encoder",
         {"patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1], "embed_dim": [16, 32],
          "num_heads": [1, 2], "depth": [1, 2], "mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0, 0.0],
          "drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.1], "qkv_bias": [True, True],
          "cls_token": [False, True], "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3],
          "padding_kv": [1, 1], "stride_kv": [2, 2], "padding_q": [1, 1], "stride_q": [1, 1]},
         vary_length=True, slow_dynamic=True),
    _row("mgp-str", "MgpstrModel", image, "vision encoder",
         {"image_size": [32, 32], "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
          "num_attention_heads": 4, "mlp_ratio": 2.0}),
    _row("swiftformer", "SwiftFormerModel", image, "vision cnn encoder",
         {"image_size": 32, "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "mlp_ratio": 2},
         vary_length=True, length=64),
    _row("videomae", "VideoMAEModel",
         lambda batch, length: ((), {"pixel_values": noise(batch, 4, 3, length, length)}), "vision encoder",
         VIT | {"num_frames": 4}),
    _row("timesformer", "TimesformerModel",
         lambda batch, length: ((), {"pixel_values": noise(batch, 4, 3, length, length)}), "vision encoder",
         VIT | {"num_frames": 4}),
    _row("dpt", "DPTForSemanticSegmentation", image, "vision encoder",
         VIT | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 16,
                                                                                                    24, 32],
                "fusion_hidden_size": 16, "use_batch_norm_in_fusion_residual": True, "num_labels": 4}),
    _row("owlvit-vision", "OwlViTVisionModel", image, "vision encoder", VIT),
    _row("mlcd", "MLCDVisionModel", image, "vision encoder", VIT),
    _row("clap-audio", "ClapAudioModel",
         lambda batch, length: ((), {"input_features": noise(batch, 1, length, 32)}), "audio encoder",
         {"spec_size": 64, "num_mel_bins": 32, "window_size": 4, "patch_size": 4,
          "patch_embeds_hidden_size": 16,
          "hidden_size": 32, "depths": [2, 2], "num_attention_heads": [2, 4], "num_hidden_layers": 2},
          length=64),
    # Vision, convolutional
    _row("dinov3-convnext", "DINOv3ConvNextModel", image, "vision cnn",
         {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]},
         vary_length=True, length=64),
    _row("resnet", "ResNetForImageClassification", image, "vision cnn",
         {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"},
         vary_length=True),
    _row("resnet-bottleneck", "ResNetModel", image, "vision cnn",
         {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 1], "layer_type": "bottleneck"},
         vary_length=True),
    _row("bit", "BitModel", image, "vision cnn",
         {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 4},
         vary_length=True),
    _row("regnet", "RegNetForImageClassification", image, "vision cnn",
         {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8},
         vary_length=True),
    _row("mobilenet-v1", "MobileNetV1ForImageClassification", image, "vision cnn",
         {"depth_multiplier": 0.25, "min_depth": 8},
         vary_length=True, length=64),
    _row("mobilenet-v2", "MobileNetV2ForImageClassification", image, "vision cnn",
         {"depth_multiplier": 0.35, "image_size": 32}),
    _row("efficientnet", "EfficientNetModel", image, "vision cnn",
         {"width_coefficient": 0.25, "depth_coefficient": 0.3, "image_size": 32, "hidden_dim": 320},
         vary_length=True, length=64),
    _row("convnext", "ConvNextForImageClassification", image, "vision cnn",
         {"depths": [1, 2], "hidden_sizes": [16, 32], "num_stages": 2},
         vary_length=True),
    _row("convnext-v2", "ConvNextV2ForImageClassification", image, "vision cnn",
         {"depths": [1, 2], "hidden_sizes": [16, 32], "num_stages": 2},
         vary_length=True),
    _row("textnet", "TextNetModel", image, "vision cnn",
         {"stem_out_channels": 16, "hidden_sizes": [16, 16, 24, 32, 48],
          "conv_layer_kernel_sizes": [[[3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]],
          "conv_layer_strides": [[1], [2], [2], [2]]},
         vary_length=True),
    _row("hgnet-v2", "HGNetV2ForImageClassification", image, "vision cnn",
         {"embedding_size": 16, "depths": [1, 1], "hidden_sizes": [32, 48], "stem_channels": [3, 8, 16],
          "stage_in_channels": [16, 32], "stage_mid_channels": [8, 16], "stage_out_channels": [32, 48],
          "stage_num_blocks": [1, 1], "stage_downsample": [False, True], "stage_downsample_strides": [2, 2],
          "stage_light_block": [False, True], "stage_kernel_size": [3, 5], "stage_numb_of_layers": [2, 2],
          "use_learnable_affine_block": True},
         vary_length=True),
    # Audio
    _row("whisper", "WhisperForConditionalGeneration", whisper, "audio text encdec",
         SEQ2SEQ | {"num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32,
                    "suppress_tokens": None, "begin_suppress_tokens": None}),
    _row("speech-to-text", "Speech2TextModel",
         lambda batch, length: ((), {"input_features": noise(batch, length, 16), "use_cache": False,
                                     "decoder_input_ids": _ids(batch, 5)}), "audio encdec",
         SEQ2SEQ | {"input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 64,
                    "max_target_positions": 32}, length=32, vary_length=True),
    _row("wav2vec2", "Wav2Vec2ForCTC", wave, "audio encoder", SPEECH | {"ctc_zero_infinity": True},
         length=400, vary_length=True),
    _row("wav2vec2-stable", "Wav2Vec2Model", wave, "audio encoder",
         SPEECH | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}, length=400, vary_length=True),
    _row("hubert", "HubertModel", wave, "audio encoder", SPEECH, length=400, vary_length=True),
    _row("wavlm", "WavLMModel", wave, "audio encoder", SPEECH, length=400, vary_length=True),
    _row("unispeech", "UniSpeechModel", wave, "audio encoder", SPEECH, length=400, vary_length=True),
    _row("data2vec-audio", "Data2VecAudioModel", wave, "audio encoder", SPEECH, length=400, vary_length=True),
    _row("sew", "SEWModel", wave, "audio encoder", SPEECH, length=400, vary_length=True),
    _row("wav2vec2-conformer", "Wav2Vec2ConformerModel", wave, "audio encoder",
         SPEECH | {"conv_depthwise_kernel_size": 5, "position_embeddings_type": None}, length=400,
         vary_length=True),
    _row("wav2vec2-bert", "Wav2Vec2BertModel",
         lambda batch, length: ((), {"input_features": noise(batch, length, 20)}), "audio encoder",
         SPEECH | {"feature_projection_input_dim": 20, "conv_depthwise_kernel_size": 5}, length=16,
         vary_length=True),
    _row("hifi-gan", "SpeechT5HifiGan", lambda batch, length: ((noise(batch, length, 16),), {}), "audio cnn",
         {"model_in_dim": 16, "upsample_initial_channel": 32, "upsample_rates": [2, 2],
          "upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]},
         length=16, vary_length=True),
    _row("patchtst", "PatchTSTModel", lambda batch, length: ((), {"past_values": noise(batch, length, 3)}),
         "audio encoder",
         {"num_input_channels": 3, "context_length": 32, "patch_length": 4, "patch_stride": 4,
          "num_hidden_layers": 2, "d_model": 32, "ffn_dim": 48}, length=32),
    _row("moonshine", "MoonshineForConditionalGeneration",
         lambda batch, length: ((), {"input_values": noise(batch, 1000), "use_cache": False,
                                     "decoder_input_ids": _ids(batch, length)}), "audio text encdec",
         TEXT | {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
                 "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
                 "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4}),
    _row("musicgen-decoder", "MusicgenForCausalLM",
         lambda batch, length: ((), {"input_ids": _ids(2 * batch, length) % 60, "use_cache": False}),
         "audio decoder",
         TEXT | {"vocab_size": 64, "ffn_dim": 48, "num_codebooks": 2, "pad_token_id": 60, "bos_token_id": 60},
         length=8, vary_length=True, least_batch=2),
)
# fmt: on

HUGGING_FACE: dict[str, Entry] = {entry.name: entry for entry in _ROWS}
