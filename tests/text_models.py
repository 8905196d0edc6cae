"""Tiny text encoders and tokenizers with random weights, built from configs: nothing is downloaded."""

import pytest
import torch

from diffusers_vdm import VDMPipeline, VDMScheduler, VDMUNet2DConditionModel
from diffusers_vdm.text_unet import text_arguments
from tests.models import fixed_weights
from tests.tensors import seeded

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "a", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight",
         "nine", "thin", "bold", "digit", "the", ",")  # fmt: skip


def tiny_tokenizer():
    """A fast tokenizer with a word for each token, and a token at both ends."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=12,
    )  # fmt: skip


def tiny_text_encoder(kind: str = "clip", hidden_size: int = 16):
    """The text model of CLIP, or the encoder of T5, for the tokens of [`tiny_tokenizer`]."""
    transformers = pytest.importorskip("transformers")
    with fixed_weights(3):
        if kind == "clip":
            config = transformers.CLIPTextConfig(
                vocab_size=len(WORDS), hidden_size=hidden_size, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=12, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
            return transformers.CLIPTextModel(config).eval()
        config = transformers.T5Config(
            vocab_size=len(WORDS), d_model=hidden_size, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0,
            eos_token_id=2,
        )  # fmt: skip
        return transformers.T5EncoderModel(config).eval()


def text_unet(hidden_size: int = 16, **arguments) -> VDMUNet2DConditionModel:
    """A network with random weights in every layer."""
    shared = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "fourier_exponents": (2.0,)}
    with fixed_weights():
        unet = VDMUNet2DConditionModel(**shared | text_arguments((8, 8), 16, hidden_size) | arguments)
    source = seeded(42)
    with torch.no_grad():
        unet.conv_out.weight.copy_(0.05 * torch.randn(unet.conv_out.weight.shape, generator=source))
    return unet.eval()


def text_pipeline(kind: str = "clip", **arguments) -> VDMPipeline:
    models = {"text_encoder": tiny_text_encoder(kind), "tokenizer": tiny_tokenizer()}
    pipe = VDMPipeline(text_unet(**arguments), VDMScheduler(), num_levels=17, **models)
    pipe.set_progress_bar_config(disable=True)
    return pipe
