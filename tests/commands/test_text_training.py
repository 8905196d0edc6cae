"""Digits with captions: a network learns what the words mean, and draws what a prompt says."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from diffusers_vdm import VDMPipeline
from tests.running import run_example
from tests.text_models import tiny_text_encoder, tiny_tokenizer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EACH = 6  # images of each digit and style


def captioned_digits(root):
    """The bundled digits as a folder of images with three captions each; returns the ink that separates bold ones."""
    digits = load_digits()
    order, median = np.random.default_rng(0).permutation(1797), float(np.median(digits.images.sum((1, 2))))
    for split, part in (("train", order[:1500]), ("test", order[1500:])):
        (root / split).mkdir(parents=True)
        rows = []
        for i in part:
            image, word = digits.images[i], WORDS[digits.target[i]]
            style = "bold" if image.sum() > median else "thin"
            Image.fromarray((image * 15).astype(np.uint8)).save(root / split / f"{i}.png")
            captions = [f"a {word} , {style}", f"{style} {word}", f"the digit {word}"]
            rows.append(json.dumps({"file_name": f"{i}.png", "captions": captions}))
        (root / split / "metadata.jsonl").write_text("\n".join(rows))
    return median


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_prompts_are_obeyed_as_a_classifier_that_was_trained_apart_counts(tmp_path):
    median = captioned_digits(tmp_path / "digits")
    tiny_text_encoder(hidden_size=32).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    # the unweighted objective: of the bits of an image, few depend on its text
    options = (
        "--caption_column captions --width 16 --max_train_steps 1000 --objective ddpm --schedule fixed_linear "
        "--gamma_min -8 --learning_rate 3e-3 --ema_max_decay 0.998 --lr_warmup_steps 100 --eval_steps 0 "
        "--mixed_precision no --num_threads 1 --eval_samples 2 --num_images 4 --ddpm_num_inference_steps 5"
    )
    out = tmp_path / "out"
    run_example("train.py", "--output_dir", out, "--train_data_dir", tmp_path / "digits", "--text_encoder",
                tmp_path / "encoder", "--cache_dir", tmp_path / "cache", *options.split())  # fmt: skip
    digits = load_digits()
    train = np.random.default_rng(0).permutation(1797)[:1500]
    classifier = SVC(gamma=0.001, C=10).fit(digits.images[train].reshape(1500, -1), digits.target[train])
    pipe = VDMPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    right, styles = [], []
    for style in ("thin", "bold"):
        prompts = [f"a {word} , {style}" for word in WORDS]
        generators = [torch.Generator().manual_seed(i) for i in range(EACH * 10)]
        arguments = {"num_images_per_prompt": EACH, "guidance_scale": 3.0, "output_type": "np"}
        found = pipe(prompt=prompts, num_inference_steps=25, generator=generators, **arguments).images[..., 0]
        images = np.round(found * 255 / 15)
        right += list(classifier.predict(images.reshape(len(images), -1)) == np.repeat(np.arange(10), EACH))
        styles += list((images.sum((1, 2)) > median) == (style == "bold"))
    # 0.1 and 0.5 by chance
    assert np.mean(right) > 0.4 and np.mean(styles) > 0.6, (np.mean(right), np.mean(styles))
    # without the texts, the bits are those of the empty text
    few = [
        "--model",
        out,
        "--data_dir",
        tmp_path / "digits",
        "--split",
        "test[:20]",
        "--cache_dir",
        tmp_path / "cache",
    ]
    reports = []
    for option in ("--null_conditions", "--no-null_conditions"):
        run_example("evaluate.py", *few, option, "--num_samples", 4, "--output", tmp_path / "r.json")
        reports.append(json.loads((tmp_path / "r.json").read_text(encoding="utf-8")))
    assert [report["conditions"] for report in reports] == [[], ["encoder_attention_mask", "encoder_hidden_states"]]
    assert reports[0]["bpd"] != reports[1]["bpd"]
