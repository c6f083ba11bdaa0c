import torch

from models.demo.video import captions, networks


def test_a_word_of_the_grammar_is_one_token_and_any_text_survives_the_round_trip():
    tokenizer = networks.tokenizer(networks.DEMO)
    for word in (*captions.COLOURS, *captions.SHAPES):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    strange = "größe → 42"
    assert tokenizer.decode(tokenizer(strange).input_ids, skip_special_tokens=True).strip() == strange


def test_an_empty_prompt_is_its_end_alone():
    assert networks.tokenizer(networks.DEMO)("").input_ids == [1]


def test_every_caption_fits():
    tokenizer = networks.tokenizer(networks.DEMO)
    lines = captions.describe(captions.sample(3000, seed=9), seed=9)
    assert max(len(tokenizer(line).input_ids) for line in lines) <= 32


def test_the_tiny_pipeline_makes_a_finite_clip():
    pipe = networks.pipeline(networks.TINY)
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    small = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 64}
    video = pipe("a red circle moves up", output_type="pt", generator=g, **small).frames
    assert video.shape == (1, 5, 3, 32, 48)
    assert torch.isfinite(video).all()
