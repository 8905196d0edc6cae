"""Texts: their encoding, the network that attends to them, prompts, and pipelines with a text encoder."""

import json
import logging
import math
import shutil

import pytest
import torch
from torch import nn

from diffusers_vdm import (
    FixedLinearGamma,
    VariationalBound,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DConditionModel,
    evaluate_mc,
    evaluate_ode,
    evaluate_vlb,
)
from diffusers_vdm.guidance import GuidedNetwork
from diffusers_vdm.text_unet import text_arguments
from diffusers_vdm.texts import encode_texts, text_length
from tests.tensors import normal, random_levels
from tests.text_models import text_pipeline, text_unet, tiny_text_encoder, tiny_tokenizer

TEXTS = ["a seven , thin", "bold two", ""]
KINDS = pytest.mark.parametrize("kind", ["clip", "t5"])


def drawn(pipe, count=2, **arguments):
    generator = [torch.Generator().manual_seed(i) for i in range(count)]
    return pipe(num_inference_steps=3, generator=generator, output_type="latent", **arguments).images


# ---- the encoding ------------------------------------------------------------------------------------------------


@KINDS
def test_a_text_is_embedded_alike_alone_and_among_longer_ones(kind):
    encoder, tokenizer = tiny_text_encoder(kind), tiny_tokenizer()
    hidden, mask = encode_texts(encoder, tokenizer, TEXTS)
    assert hidden.shape == (3, text_length(encoder, tokenizer), 16) == (3, 12, 16) and hidden.dtype == torch.float32
    assert mask.sum(1).tolist() == [6, 4, 2]  # words, and a token at both ends
    assert not hidden[mask == 0].any()
    for text, row, count in zip(TEXTS, hidden, mask.sum(1).tolist(), strict=True):
        tokens = torch.tensor([tokenizer(text).input_ids])
        alone = encoder(tokens).last_hidden_state[0]
        torch.testing.assert_close(row[:count], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(hidden[0, 1], hidden[0, 2])


def test_a_text_that_is_too_long_is_cut_with_a_warning(caplog):
    encoder, tokenizer = tiny_text_encoder(), tiny_tokenizer()
    with caplog.at_level(logging.WARNING):
        logging.getLogger("diffusers").propagate = True
        hidden, mask = encode_texts(encoder, tokenizer, ["one " * 30])
    assert hidden.shape[1] == 12 and int(mask.sum()) == 12
    assert "cut off at 12 tokens" in caplog.text


# ---- the network -------------------------------------------------------------------------------------------------

Z, T = normal(3, 1, 8, 8).float(), torch.tensor([1.5, 300.25, 1000.0])


def test_padding_has_no_effect_and_words_have():
    unet = text_unet()
    hidden, mask = normal(3, 6, 16).float(), torch.tensor([[1, 1, 1, 0, 0, 0]] * 3)
    given = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
    base = unet(Z, T, **given).sample
    other = hidden.clone()
    other[:, 3:] += 7.0
    torch.testing.assert_close(unet(Z, T, other, encoder_attention_mask=mask).sample, base, rtol=1e-5, atol=1e-5)
    short = unet(Z, T, hidden[:, :3]).sample
    torch.testing.assert_close(short, base, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unet(Z, T, hidden.flip(1), encoder_attention_mask=mask).sample, base, atol=1e-4)
    assert not torch.allclose(unet(Z, T + 0.4, **given).sample, base, atol=1e-6)  # timesteps are real numbers


def test_the_network_is_that_of_diffusers_with_features_and_a_residual():
    unet = text_unet(fourier_exponents=(), input_residual=False)
    from diffusers import UNet2DConditionModel

    arguments = {name: unet.config[name] for name in text_arguments((8, 8), 16, 16) if name != "input_residual"}
    plain = UNet2DConditionModel(sample_size=8, in_channels=1, out_channels=1, **arguments).eval()
    plain.load_state_dict(unet.state_dict())
    hidden = normal(3, 6, 16).float()
    expected = plain(Z, T, hidden).sample
    assert torch.equal(unet(Z, T, hidden).sample, expected)
    residual = text_unet(fourier_exponents=())
    assert torch.equal(residual(Z, T, hidden).sample, expected + Z)
    fresh = VDMUNet2DConditionModel(in_channels=1, out_channels=1, **text_arguments((8, 8), 16, 16))
    assert torch.equal(fresh(Z, T, hidden).sample, Z)


def test_half_precision_keeps_the_fourier_features():
    """Two values of z that are one number in bfloat16 have different features."""
    unet = text_unet(fourier_exponents=(7.0,)).to(torch.bfloat16)
    z = torch.full((1, 1, 8, 8), 0.7)
    hidden = normal(1, 3, 16).float()
    outputs = [unet(z + shift, T[:1], hidden).sample - (z + shift) for shift in (0.0, 0.001)]
    assert torch.equal(z.bfloat16(), (z + 0.001).bfloat16())
    assert outputs[0].dtype == torch.float32 and not torch.equal(*outputs)


def test_a_network_of_texts_is_saved_and_loaded(tmp_path):
    unet = text_unet(cond_channels=1, null_images=True)
    unet.save_pretrained(tmp_path)
    again = VDMUNet2DConditionModel.from_pretrained(tmp_path)
    given = {"encoder_hidden_states": normal(3, 6, 16).float(), "cond_images": normal(3, 1, 4, 4).float()}
    assert torch.equal(unet(Z, T, **given).sample, again(Z, T, **given).sample)
    assert not torch.allclose(unet(Z, T, given["encoder_hidden_states"]).sample, again(Z, T, **given).sample)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"encoder_hidden_states": torch.zeros(3, 6, 8)},
            r"shape \(3, L, 16\), got \(3, 6, 8\); use the text encoder",
        ),
        ({"encoder_hidden_states": torch.zeros(2, 6, 16)}, r"shape \(3, L, 16\)"),
        ({"encoder_hidden_states": torch.zeros(3, 16)}, r"shape \(3, L, 16\)"),
    ],
)
def test_texts_of_another_encoder_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        text_unet()(Z, T, **arguments)


def test_images_that_the_network_of_texts_does_not_take_are_refused():
    hidden, images = normal(3, 6, 16).float(), normal(3, 1, 4, 4).float()
    with pytest.raises(ValueError, match="cond_images were given to a network without them"):
        text_unet()(Z, T, hidden, cond_images=images)
    with pytest.raises(ValueError, match="cond_images must be given to this network"):
        text_unet(cond_channels=1)(Z, T, hidden)
    with pytest.raises(ValueError, match="cond_images must be of at most the size of sample"):
        text_unet(cond_channels=1)(Z, T, hidden, cond_images=normal(3, 1, 9, 8).float())


class TwoTexts(nn.Module):
    """The best network for two Gaussians, of which the first value of the first token says which."""

    dtype = torch.float64
    config = {"cross_attention_dim": 1, "in_channels": 1, "sample_size": 4}

    def forward(self, z_t, timestep, encoder_hidden_states, encoder_attention_mask=None, return_dict=True):
        gamma_t = SCHEDULE.gamma_of_timestep(timestep).reshape(-1, 1, 1, 1)
        mean = 0.3 * encoder_hidden_states[:, 0, 0].reshape(-1, 1, 1, 1)
        a2, s2 = torch.sigmoid(-gamma_t), torch.sigmoid(gamma_t)
        return (s2.sqrt() * (z_t - a2.sqrt() * mean) / (a2 * 0.01 + s2),)


SCHEDULE = FixedLinearGamma(-12.0, 6.0)


@pytest.mark.parametrize("method", ["mc", "vlb", "ode"])
def test_likelihoods_of_images_with_their_texts(method):
    words = torch.tensor([1.0, -1.0]).double().repeat(40)[:, None, None]
    x = 0.3 * words[..., None] + 0.1 * normal(80, 1, 4, 4)
    images = (128 * (x + 1) - 0.5).round().clamp(0, 255).to(torch.uint8)

    def bpd(texts):
        given = {"encoder_hidden_states": texts, "progress_bar": False}
        if method == "mc":
            return evaluate_mc(VariationalBound(TwoTexts(), SCHEDULE), images, num_samples=20, **given).bpd
        if method == "vlb":
            return evaluate_vlb(
                TwoTexts(), VDMScheduler.from_noise_schedule(SCHEDULE), images, num_steps=300, **given
            ).bpd
        return evaluate_ode(TwoTexts(), SCHEDULE, images, rtol=1e-4, atol=1e-4, **given).bpd

    entropy = (0.5 * math.log(2 * math.pi * math.e * 0.01) - math.log(2 / 256)) / math.log(2)
    right, wrong = bpd(words), bpd(-words)
    assert right == pytest.approx(entropy, abs=0.25)
    # E[(x − m')² − (x − m)²]/(2 v) for means that differ by 0.6
    assert wrong - right == pytest.approx(0.36 / (2 * 0.01 * math.log(2)), rel=0.05)


# ---- the pipeline ------------------------------------------------------------------------------------------------


@KINDS
def test_prompts_draw_images_and_guidance_follows_them(kind):
    pipe = text_pipeline(kind)
    given = drawn(pipe, prompt=TEXTS[:2])
    assert given.shape == (2, 1, 8, 8)
    assert torch.equal(drawn(pipe, prompt=TEXTS[:2], guidance_scale=1.0), given)
    null = drawn(pipe, batch_size=2)
    assert torch.equal(drawn(pipe, prompt="", batch_size=2), null)
    torch.testing.assert_close(drawn(pipe, prompt=TEXTS[:2], guidance_scale=0.0), null)
    guided = drawn(pipe, prompt=TEXTS[:2], guidance_scale=3.0)
    assert not torch.allclose(guided, given, atol=1e-3)
    torch.testing.assert_close(drawn(pipe, prompt=TEXTS[:2], negative_prompt="", guidance_scale=3.0), guided)
    away = drawn(pipe, prompt=TEXTS[:2], negative_prompt=["a one", "a four"], guidance_scale=3.0)
    assert not torch.allclose(away, guided, atol=1e-3)
    itself = drawn(pipe, prompt=TEXTS[:2], negative_prompt=TEXTS[:2], guidance_scale=3.0)
    torch.testing.assert_close(itself, given, rtol=1e-3, atol=1e-3)


def test_a_guided_step_is_the_formula_for_the_encoded_texts():
    pipe = text_pipeline()
    hidden, mask = encode_texts(pipe.text_encoder, pipe.tokenizer, TEXTS[:2])
    null, null_mask = encode_texts(pipe.text_encoder, pipe.tokenizer, [""])
    z, t = Z[:2], T[:2]
    strong = pipe.unet(z, t, hidden, encoder_attention_mask=mask).sample
    weak = pipe.unet(z, t, null.expand(2, -1, -1), encoder_attention_mask=null_mask.expand(2, -1)).sample
    negative = {"encoder_hidden_states": null, "encoder_attention_mask": null_mask}
    guided = GuidedNetwork(pipe.unet, FixedLinearGamma(), 2.5, negative_conditions=negative)
    found = guided(z, t, encoder_hidden_states=hidden, encoder_attention_mask=mask)[0]
    torch.testing.assert_close(found, weak + 2.5 * (strong - weak), rtol=1e-4, atol=1e-4)


def test_embedded_prompts_are_prompts():
    pipe = text_pipeline()
    hidden, mask = encode_texts(pipe.text_encoder, pipe.tokenizer, TEXTS[:2])
    other, other_mask = encode_texts(pipe.text_encoder, pipe.tokenizer, ["a one"])
    expected = drawn(pipe, prompt=TEXTS[:2], negative_prompt="a one", guidance_scale=2.0)
    found = drawn(pipe, prompt_embeds=hidden, prompt_attention_mask=mask, negative_prompt_embeds=other,
                  negative_prompt_attention_mask=other_mask, guidance_scale=2.0)  # fmt: skip
    assert torch.equal(found, expected)
    alone = VDMPipeline(pipe.unet, pipe.scheduler, num_levels=17)
    alone.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(alone, prompt_embeds=hidden, prompt_attention_mask=mask), drawn(pipe, prompt=TEXTS[:2]))


def test_one_prompt_for_all_images_and_several_images_for_each():
    pipe = text_pipeline()
    one = drawn(pipe, 3, prompt="a seven", batch_size=3)
    torch.testing.assert_close(one, drawn(pipe, 3, prompt=["a seven"] * 3), rtol=1e-4, atol=1e-4)
    several = drawn(pipe, 4, prompt=["a seven", "a two"], num_images_per_prompt=2, guidance_scale=2.0)
    each = drawn(pipe, 4, prompt=["a seven", "a seven", "a two", "a two"], guidance_scale=2.0)
    torch.testing.assert_close(several, each)


CALLS = [
    ({"prompt": 3}, TypeError, "prompt must be a string or a list of strings, got int"),
    ({"prompt": []}, ValueError, "prompt must be at least one string"),
    ({"prompt": ["a", 4]}, TypeError, "prompt must be a string or a list"),
    ({"prompt": ["a", "b", "c"]}, ValueError, "must be one prompt or 2 of them, got 3"),
    ({"prompt": "a", "prompt_embeds": torch.zeros(1, 12, 16)}, ValueError, "either prompt or prompt_embeds"),
    ({"prompt_embeds": torch.zeros(2, 12, 8)}, ValueError, r"encoder_hidden_states must have shape \(2, L, 16\)"),
    ({"prompt_embeds": torch.full((2, 12, 16), math.nan)}, ValueError, "encoder_hidden_states must be finite"),
    ({"prompt_embeds": torch.zeros(12, 16)}, TypeError, r"prompt_embeds must be a torch.Tensor of shape \(B, L, D\)"),
    ({"prompt_embeds": torch.zeros(1, 2, 16), "prompt_attention_mask": [[1, 1]]}, TypeError, "mask must be a torch.T"),
    ({"prompt_attention_mask": torch.ones(2, 12)}, ValueError, "prompt_attention_mask needs prompt_embeds"),
    ({"prompt": "a", "negative_prompt": "b"}, ValueError, "negative_prompt has no effect with guidance_scale=1"),
    ({"prompt": "a", "negative_prompt": ["b"] * 3, "guidance_scale": 2.0}, ValueError, "one text or 2 of them, got 3"),
    ({"prompt": "a", "class_labels": 1}, ValueError, "built without classes"),
]


@pytest.mark.parametrize("given, error, message", CALLS)
def test_wrong_prompts_are_refused_before_the_network_is_called(given, error, message):
    pipe, calls = text_pipeline(), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=message):
        pipe(2, 2, **given)
    assert not calls


def test_prompts_need_a_text_encoder_and_a_network_of_texts():
    pipe = text_pipeline()
    alone = VDMPipeline(pipe.unet, pipe.scheduler, num_levels=17)
    with pytest.raises(ValueError, match="prompt needs a pipeline with a text_encoder and a tokenizer"):
        alone(prompt="a")
    with pytest.raises(ValueError, match="encoder_hidden_states must be given"):
        alone(2)
    with pytest.raises(ValueError, match="tokenizer must be given with text_encoder, got None"):
        VDMPipeline(pipe.unet, pipe.scheduler, text_encoder=pipe.text_encoder)


# ---- saved pipelines ---------------------------------------------------------------------------------------------


@KINDS
def test_a_pipeline_with_texts_is_saved_and_loaded(tmp_path, kind):
    pipe = text_pipeline(kind)
    pipe.save_pretrained(tmp_path)
    again = VDMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(pipe, prompt=TEXTS[:2]), drawn(again, prompt=TEXTS[:2]))
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert all(name.endswith((".json", ".safetensors")) for name in files)
    other = VDMPipeline.from_pipe(again, scheduler=VDMScheduler())
    assert other.text_encoder is again.text_encoder and other.tokenizer is again.tokenizer


def spoiled(folder, how: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    if how == "library":
        index["text_encoder"] = ["os", "PathLike"]
    elif how == "class":
        index["text_encoder"] = ["transformers", "Trainer"]
    elif how == "tokenizer class":
        index["tokenizer"] = ["transformers", "CLIPTextModel"]
    elif how == "pickle":
        (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")
    elif how == "slow tokenizer":
        (folder / "tokenizer" / "tokenizer.json").rename(folder / "tokenizer" / "vocab.txt")
    elif how == "config":
        (folder / "text_encoder" / "config.json").unlink()
    elif how == "code":
        (folder / "text_encoder" / "transformers.py").write_text("raise SystemExit")
    (folder / "model_index.json").write_text(json.dumps(index))


SPOILED = [
    ("library", ValueError, "must give text_encoder as a class of transformers, got PathLike of os"),
    ("class", ValueError, "text_encoder as Trainer, which is not a PreTrainedModel"),
    ("tokenizer class", ValueError, "tokenizer as CLIPTextModel, which is not a PreTrainedTokenizerBase"),
    ("pickle", ValueError, "weights of text_encoder only as pickles"),
    ("slow tokenizer", OSError, "only fast tokenizers are read"),
    ("config", OSError, "text_encoder/config.json"),
    ("code", ValueError, "gives text_encoder as its own code"),
]


@pytest.mark.parametrize("how, error, message", SPOILED)
def test_components_that_could_run_code_or_are_damaged_are_refused(tmp_path, how, error, message):
    text_pipeline().save_pretrained(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    spoiled(tmp_path / "bad", how)
    with pytest.raises(error, match=message):
        VDMPipeline.from_pretrained(tmp_path / "bad")
    VDMPipeline.from_pretrained(tmp_path / "good")


def test_images_of_a_network_of_texts_are_measured_only_with_texts():
    images = random_levels(2, 1, 8, 8, num_levels=17).to(torch.uint8)
    bound = VariationalBound(text_unet(), FixedLinearGamma(), num_levels=17)
    with pytest.raises(ValueError, match="encoder_hidden_states must be given"):
        evaluate_mc(bound, images, progress_bar=False)
