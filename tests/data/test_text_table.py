"""data/text_table.py: captions are read, embedded once, kept in a file, and drawn with their images."""

from dataclasses import replace

import datasets
import pytest
import torch

from diffusers_vdm.data import text_table
from diffusers_vdm.data.conditions import ConditionData, conditions_of
from diffusers_vdm.data.text_table import embed_captions, load_text_encoder, read_captions
from diffusers_vdm.texts import encode_texts
from diffusers_vdm.training.batches import keyed_batch
from tests.pictures import random_image_set
from tests.text_models import text_unet, tiny_text_encoder, tiny_tokenizer

CAPTIONS = [["a seven", "thin seven"], ["a two"], ["a seven", "", "bold one"]]


def embedded(tmp_path, captions=CAPTIONS, encoder=None):
    return embed_captions(encoder or tiny_text_encoder(), tiny_tokenizer(), captions, tmp_path, progress_bar=False)


def test_the_table_holds_each_text_once_as_the_encoder_gives_it(tmp_path):
    table, indices = embedded(tmp_path)
    assert indices == ((1, 2), (3,), (1, 0, 4)) and len(table.offsets) == 6
    hidden, mask = table.rows(torch.tensor([2, 0, 4]))
    expected, expected_mask = encode_texts(tiny_text_encoder(), tiny_tokenizer(), ["thin seven", "", "bold one"])
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


def test_the_file_is_read_again_and_another_encoder_has_another_one(tmp_path, monkeypatch):
    table, _ = embedded(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(text_table, "encode_texts", None)  # nothing is embedded again
        again, _ = embedded(tmp_path)
    assert torch.equal(again.tokens, table.tokens) and again.fingerprint == table.fingerprint
    other = tiny_text_encoder()
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    changed, _ = embedded(tmp_path, encoder=other)
    assert changed.fingerprint != table.fingerprint and not torch.equal(changed.tokens, table.tokens)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    again = tiny_text_encoder()
    again.save_pretrained(tmp_path / "saved")  # writes its class into its config
    assert embedded(tmp_path, encoder=again)[0].fingerprint == table.fingerprint
    more, _ = embedded(tmp_path, [*CAPTIONS, ["nine"]])
    assert more.fingerprint not in (table.fingerprint, changed.fingerprint)


def test_a_damaged_file_and_an_interrupted_write_are_made_good(tmp_path, monkeypatch):
    tokens = embedded(tmp_path)[0].tokens.clone()  # the table itself is mapped from the file
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-5])
    assert torch.equal(embedded(tmp_path)[0].tokens, tokens)
    path.unlink()
    whole = encode_texts

    def interrupted(encoder, tokenizer, texts):
        if len(texts) > 1:
            raise KeyboardInterrupt
        return whole(encoder, tokenizer, texts)

    with monkeypatch.context() as patch:
        patch.setattr(text_table, "encode_texts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embedded(tmp_path)
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*.tmp"))
    assert torch.equal(embedded(tmp_path)[0].tokens, tokens)


def test_captions_are_texts_or_lists_of_them():
    rows = datasets.Dataset.from_dict({"text": ["a", ""], "texts": [["a", "b"], ["c"]]})
    assert read_captions(rows, "text", "data") == [["a"], [""]]
    assert read_captions(rows, "texts", "data") == [["a", "b"], ["c"]]


BAD = [
    ({"text": ["a", None]}, "text", "must have a text, or a list of texts, in each row, got None in row 1"),
    ({"text": [1, 2]}, "text", "got 1 in row 0"),
    ({"text": [["a"], []]}, "text", r"got \[\] in row 1"),
    ({"text": ["a"]}, "caption", "data has no column 'caption'; its columns are"),
]


@pytest.mark.parametrize("columns, name, message", BAD)
def test_rows_without_a_caption_are_refused(columns, name, message):
    with pytest.raises(ValueError, match=message):
        read_captions(datasets.Dataset.from_dict(columns), name, "data")


def test_batches_draw_captions_of_their_images_and_the_empty_text_for_those_withheld(generator, tmp_path):
    data = random_image_set(3, generator)
    table, indices = embedded(tmp_path)
    first = torch.tensor([each[0] for each in indices])
    data = replace(data, conditions=ConditionData(texts=table, captions=indices, text_rows=first))
    seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    batch = keyed_batch(data, 1, range(300), 300, seed=0, condition_dropout=0.2)
    for image, row in zip(batch.images, batch.conditions.text_rows.tolist(), strict=True):
        which = next(i for i in range(3) if torch.equal(data.images[i], image))
        seen[which].add(row)
    assert [sorted(rows) for rows in seen.values()] == [sorted(each) for each in indices]
    assert torch.equal(data.conditions.text_rows, first)  # the data set is not changed
    without = batch.withheld["encoder_hidden_states"]
    assert 30 < int(without.sum()) < 95
    given = conditions_of(text_unet(), batch.images, 256, None, batch.conditions, without)
    null, null_mask = table.rows(torch.tensor([0]))
    assert torch.equal(given["encoder_hidden_states"][without], null.expand(int(without.sum()), -1, -1))
    assert int(given["encoder_attention_mask"][~without].sum(1).max()) == 4
    for rows in (range(7), range(7, 300)):
        part = keyed_batch(data, 1, rows, 300, seed=0, condition_dropout=0.2)
        assert torch.equal(part.conditions.text_rows, batch.conditions.text_rows[list(rows)])


def test_an_encoder_is_loaded_from_safetensors_alone(tmp_path):
    tiny_text_encoder().save_pretrained(tmp_path / "good")
    tiny_tokenizer().save_pretrained(tmp_path / "good")
    encoder, tokenizer = load_text_encoder(str(tmp_path / "good"))
    assert type(encoder).__name__ == "CLIPTextModel" and not encoder.training
    hidden = [encode_texts(each, tokenizer, ["a two"])[0] for each in (encoder, tiny_text_encoder())]
    assert torch.equal(*hidden)
    tiny_text_encoder("t5").save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    assert type(load_text_encoder(str(tmp_path / "t5"))[0]).__name__ == "T5EncoderModel"
    (tmp_path / "good" / "model.safetensors").rename(tmp_path / "good" / "pytorch_model.bin")
    load_text_encoder.cache_clear()
    with pytest.raises((OSError, ValueError)):
        load_text_encoder(str(tmp_path / "good"))
