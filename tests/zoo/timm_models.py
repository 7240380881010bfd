"""Architectures of timm, by name: narrow or short variants, small images, no checkpoint, no network."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from tests.zoo.entry import Entry, Example, noise, randomise, seeded
from tests.zoo.torchvision_stub import import_timm

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def _image(batch: int, length: int) -> Example:
    return (noise(batch, 3, length, length),), {}


def _build(name: str, model: str, options: dict[str, Any], length: int) -> nn.Module:
    timm = import_timm()
    with seeded(name):
        if model[0].isupper():  # a class, where the registered variants are all large
            built = getattr(timm.models, model)(num_classes=10, **options)
        else:
            built = timm.create_model(model, pretrained=False, num_classes=10, **options)
        return randomise(built.eval(), _image(16, length))


def _row(
    model: str, tags: str, options: dict[str, Any] | None = None, *, name: str = "", **more: Any
) -> Entry:
    given = options or {}
    fields: dict[str, Any] = {"length": given.get("img_size", 64), "vary_length": tags == "cnn", **more}
    build = partial(_build, name or model, model, given, fields["length"])
    return Entry(name or model, build, _image, frozenset({"vision", *tags.split()}), **fields)


_UNSOLVED: dict[str, Any] = {
    "free_length": False,
    "reason": "with free image sides sympy meets an inequality that it cannot solve, and export fails",
}
# fmt: off
_ROWS: tuple[Entry, ...] = (
    # Convolutional
    _row("resnet10t", "cnn"),
    _row("resnet18", "cnn"),
    _row("seresnet18", "cnn"),
    _row("ecaresnet26t", "cnn"),
    _row("resnext26ts", "cnn"),
    _row("resnetv2_18", "cnn"),
    _row("resnetv2_50d_gn", "cnn", {"layers": [1, 1, 1, 1], "channels": [128, 128, 128, 128]}),
    _row("resnetv2_50d_evos", "cnn", {"layers": [1, 1, 1, 1], "channels": [128, 128, 128, 128]}),
    _row("resnetv2_50d_frn", "cnn", {"layers": [1, 1, 1, 1], "channels": [64, 64, 64, 128]}),
    _row("regnetx_002", "cnn"),
    _row("regnety_002", "cnn"),
    _row("regnetz_005", "cnn"),
    _row("mobilenetv2_035", "cnn"),
    _row("mobilenetv3_small_050", "cnn"),
    _row("mobilenetv4_conv_small_035", "cnn"),
    _row("lcnet_035", "cnn"),
    _row("tinynet_e", "cnn"),
    _row("mnasnet_small", "cnn"),
    _row("fbnetc_100", "cnn"),
    _row("spnasnet_100", "cnn"),
    _row("efficientnet_b0", "cnn"),
    _row("efficientnet_b0_gn", "cnn"),
    _row("efficientnet_b0_g16_evos", "cnn"),
    _row("tf_efficientnet_lite0", "cnn", slow_dynamic=True),
    _row("mixnet_s", "cnn"),
    _row("hardcorenas_a", "cnn"),
    _row("ghostnet_050", "cnn"),
    _row("ghostnetv2_100", "cnn"),
    _row("repghostnet_050", "cnn"),
    _row("repvgg_a0", "cnn"),
    _row("mobileone_s0", "cnn"),
    _row("gernet_s", "cnn"),
    _row("semnasnet_075", "cnn"),
    _row("rexnetr_100", "cnn"),
    _row("densenet121", "cnn", {"growth_rate": 8, "block_config": [2, 2, 2, 2]}),
    _row("dla46_c", "cnn"),
    _row("dpn48b", "cnn", {"k_sec": [1, 1, 1, 1]}),
    _row("ese_vovnet19b_slim_dw", "cnn"),
    _row("resnest14d", "cnn"),
    _row("skresnet18", "cnn"),
    _row("cs3darknet_focus_s", "cnn"),
    _row("cspnext_tiny", "cnn"),
    _row("hgnetv2_b0", "cnn"),
    _row("starnet_s050", "cnn"),
    _row("fasternet_t0", "cnn"),
    _row("repvit_m0_9", "cnn"),
    _row("convnext_atto", "cnn"),
    _row("convnext_atto_rms", "cnn"),
    _row("convnextv2_atto", "cnn"),
    _row("convnext_zepto_rms", "cnn"),
    _row("convnext_pico_ols", "cnn", {"depths": [1, 1, 2, 1], "dims": [16, 32, 48, 64]}),
    _row("inception_next_atto", "cnn"),
    _row("mambaout_femto", "cnn", slow_dynamic=True),
    _row("test_byobnet", "cnn"),
    _row("test_convnext", "cnn"),
    _row("test_convnext2", "cnn"),
    _row("test_convnext3", "cnn"),
    _row("test_efficientnet", "cnn"),
    _row("test_efficientnet_evos", "cnn"),
    _row("test_efficientnet_gn", "cnn"),
    _row("test_efficientnet_ln", "cnn"),
    _row("test_mambaout", "cnn"),
    _row("test_nfnet", "cnn"),
    _row("test_resnet", "cnn"),
    _row("mobilenetv1_100", "cnn"),
    _row("mobilenet_edgetpu_100", "cnn"),
    _row("lcnetv2_small", "cnn"),
    _row("cs3darknet_s", "cnn"),
    _row("VGG", "cnn", {"cfg": [16, "M", 24, "M", 32, "M"], "norm_layer": nn.BatchNorm2d}, name="vgg_bn"),
    _row("ConvMixer", "cnn", {"dim": 48, "depth": 3}, name="convmixer"),
    _row("RDNet", "cnn", name="rdnet"),
    # Vision transformers
    _row("vit_tiny_patch16_224", "encoder", VIT),
    _row("vit_base_patch16_224_miil", "encoder", VIT),
    _row("vit_little_patch16_reg4_gap_256", "encoder", VIT),
    _row("vit_base_patch16_clip_224", "encoder", VIT),
    _row("vit_base_patch16_siglip_224", "encoder", VIT),
    _row("vit_base_patch16_rpn_224", "encoder", VIT),
    _row("vit_small_patch14_dinov2", "encoder", VIT),
    _row("vit_base_patch32_plus_256", "encoder", VIT),
    _row("vit_relpos_small_patch16_224", "encoder", VIT),
    _row("vit_srelpos_small_patch16_224", "encoder", VIT),
    _row("vit_tiny_patch16_224", "encoder", VIT | {"qk_norm": True}, name="vit_qk_norm"),
    _row("vit_xsmall_patch16_clip_224", "encoder", VIT),
    _row("vit_wee_patch16_reg1_gap_256", "encoder", VIT),
    _row("vit_base_patch16_xp_224", "encoder", VIT),
    _row("deit_tiny_distilled_patch16_224", "encoder", VIT),
    _row("deit3_small_patch16_224", "encoder", VIT),
    _row("beit_base_patch16_224", "encoder", VIT),
    _row("beitv2_base_patch16_224", "encoder", VIT),
    _row("eva02_tiny_patch14_224", "encoder", VIT),
    _row("eva_giant_patch14_224", "encoder", VIT),
    _row("vit_small_patch16_dinov3", "encoder", VIT),
    _row("cait_xxs24_224", "encoder", VIT),
    _row("aimv2_large_patch14_224", "encoder", VIT),
    _row("flexivit_small", "encoder", VIT),
    _row("test_vit", "encoder", {"img_size": 32}),
    _row("test_vit3", "encoder", {"img_size": 32}),
    _row("xcit_nano_12_p16_224", "encoder", {"img_size": 64, "depth": 2, "embed_dim": 32, "num_heads": 4}),
    _row("convit_tiny", "encoder", VIT | {"num_heads": 4, "local_up_to_layer": 1}),
    _row("pit_ti_224", "encoder", {"img_size": 64, "depth": [1, 1, 1], "base_dims": [16, 16, 16]}),
    _row("tnt_s_patch16_224", "encoder", {"img_size": 32, "embed_dim": 32, "inner_dim": 8, "depth": 2,
                                          "num_heads_outer": 4}),
    _row("swin_tiny_patch4_window7_224", "encoder",
         {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}),
    _row("swinv2_tiny_window8_256", "encoder",
         {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}),
    _row("swinv2_cr_tiny_224", "encoder",
         {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}),
    _row("twins_pcpvt_small", "encoder",
         {"img_size": 64, "embed_dims": [16, 16, 32, 32], "num_heads": [1, 2, 2, 4], "depths": [1, 1, 1, 1]}),
    _row("twins_svt_small", "encoder",
         {"img_size": 64, "embed_dims": [16, 16, 32, 32], "num_heads": [1, 2, 2, 4], "depths": [2, 2, 2, 2],
          "wss": [4, 4, 2, 2]}, slow_dynamic=True),
    _row("pvt_v2_b0", "encoder", slow_dynamic=True),
    _row("hiera_tiny_224", "encoder", {"img_size": 64, "embed_dim": 32, "stages": [1, 1, 1, 1]},
         slow_dynamic=True),
    _row("samvit_base_patch16", "encoder",
         {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 4, "global_attn_indexes": [1],
          "window_size": 2}, slow_dynamic=True),
    _row("test_vit2", "encoder", {"img_size": 32}),
    _row("test_vit4", "encoder", {"img_size": 32}),
    _row("test_vit_relpos", "encoder", {"img_size": 32}),
    _row("VOLO", "encoder",
         {"img_size": 64, "layers": [1, 1, 1, 1], "embed_dims": [32, 48, 48, 48], "num_heads": [2, 4, 4, 4],
          "outlook_attention": (True, False, False, False), "downsamples": (True, False, False, False),
          "mlp_ratio": 2.0}, name="volo", **_UNSOLVED),
    _row("Nest", "encoder",
         {"img_size": 64, "embed_dims": (16, 32, 48), "num_heads": (1, 2, 4), "depths": (1, 1, 1)},
         name="nest"),
    _row("CoaT", "encoder",
         {"img_size": 64, "patch_size": 4, "embed_dims": (32, 32, 32, 32), "serial_depths": (1, 1, 1, 1),
          "parallel_depth": 1, "num_heads": 8, "mlp_ratios": (2, 2, 2, 2)}, name="coat"),
    _row("DaVit", "encoder",
         {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4),
          "window_size": 2}, name="davit", slow_dynamic=True),
    _row("FocalNet", "encoder", {"depths": (1, 1, 1, 1), "embed_dim": 16}, name="focalnet_srf"),
    _row("GlobalContextVit", "encoder",
         {"img_size": 64, "window_ratio": (8, 8, 16, 32), "depths": (1, 1, 1, 1), "embed_dim": 16,
          "num_heads": (1, 2, 2, 4)}, name="gcvit", slow_dynamic=True),
    _row("crossvit_tiny_240", "encoder", {"img_size": 240}),
    # Hybrids
    _row("test_coatnet", "encoder cnn", {"img_size": 64}, slow_dynamic=True),
    _row("test_maxvit", "encoder cnn", {"img_size": 64}, slow_dynamic=True),
    _row("MetaFormer", "cnn", {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)}, name="metaformer"),
    _row("caformer_s18", "encoder cnn"),
    _row("poolformer_s12", "cnn"),
    _row("efficientvim_m1", "encoder cnn"),
    _row("cpubone_nano", "encoder cnn", **_UNSOLVED),
    _row("mobilenetv4_hybrid_medium", "encoder cnn"),
    _row("fastvit_sa12", "encoder cnn"),
    _row("tiny_vit_5m_224", "encoder cnn", slow_dynamic=True),
    _row("levit_128s", "encoder cnn", {"img_size": 64}),
    _row("levit_conv_128s", "encoder cnn", {"img_size": 64}),
    _row("mobilevit_xxs", "encoder cnn", slow_dynamic=True),
    _row("mobilevitv2_050", "encoder cnn", slow_dynamic=True),
    _row("coatnet_nano_rw_224", "encoder cnn",
         {"img_size": 64, "depths": [1, 1, 1, 1], "embed_dim": [16, 32, 32, 64]}, slow_dynamic=True),
    _row("maxvit_pico_rw_256", "encoder cnn",
         {"img_size": 64, "depths": [1, 1, 1, 1], "embed_dim": [32, 32, 32, 64]}, slow_dynamic=True),
    _row("efficientformerv2_s0", "encoder cnn", {"img_size": 64}),
    _row("efficientvit_b0", "encoder cnn"),
    _row("efficientvit_m0", "encoder cnn", {"img_size": 64}),
    _row("edgenext_xx_small", "encoder cnn"),
    _row("fastvit_t8", "encoder cnn"),
    _row("botnet26t_256", "encoder cnn", {"img_size": 64}, **_UNSOLVED),
    _row("lambda_resnet26t", "encoder cnn"),
    _row("visformer_tiny", "encoder cnn", {"img_size": 64}, **_UNSOLVED),
    _row("shvit_s1", "encoder cnn"),
    _row("swiftformer_xs", "encoder cnn"),
    _row("vit_tiny_r_s16_p8_224", "encoder cnn", {"img_size": 64, "depth": 2}),
    _row("poolformerv2_s12", "cnn"),
    _row("iformer_t", "encoder cnn"),
    # Mixers
    _row("gmlp_ti16_224", "mixer", {"img_size": 64}),
    _row("MlpMixer", "mixer", {"img_size": 64, "embed_dim": 32, "num_blocks": 2}, name="mlp_mixer"),
    _row("resmlp_12_224", "mixer", {"img_size": 64}),
    _row("gmixer_12_224", "mixer", {"img_size": 64}),
    _row("sequencer2d_s", "mixer", {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 32]}),
)
# fmt: on

TIMM: dict[str, Entry] = {entry.name: entry for entry in _ROWS}
