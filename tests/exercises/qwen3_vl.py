"""
The oracle of exercise 10, on a tiny random Qwen3-VL. It fails until 10_qwen3_vl.patch is applied:

    git apply tests/exercises/10_qwen3_vl.patch && python -m pytest -q tests/exercises/qwen3_vl.py
"""
import json
import shutil

import pytest
import torch
from transformers import AutoConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import grpo
import sft
from conftest import batch_of, naive_logps, shake
from test_rollout import assert_sampled_with, images_of, play


@pytest.fixture(scope="module")
def qwen3_vl(base, tmp_path_factory):
    """Heads of 48 instead of 128 / 4, features for two deeper layers, patches of 16 pixels."""
    folder, config = tmp_path_factory.mktemp("qwen3_vl"), AutoConfig.from_pretrained(base)
    shutil.copytree(base, folder, dirs_exist_ok=True)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor.update(patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128})
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    text = {"vocab_size": config.text_config.vocab_size, "hidden_size": 128, "head_dim": 48,
            "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 8, 8]}}
    vision = {"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
              "out_hidden_size": 128, "num_position_embeddings": 64,
              "deepstack_visual_indexes": [0, 2]}
    ids = {name: value for name, value in config.to_dict().items() if name.endswith("token_id")}
    torch.manual_seed(2)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **ids))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()         # transformers begins with biases of 0
            elif p.ndim > 1:
                p.mul_(4)
    model.save_pretrained(folder)
    return folder


def load(folder, nf4):
    student = sft.load_student(folder, nf4)
    sft.add_lora(student, 4, 8)
    shake(student, 0.05)
    return student


@torch.no_grad()
def test_reply_logps_equal_a_naive_forward(qwen3_vl, mixed):
    student = load(qwen3_vl, nf4=False)
    rows, images = batch_of(student, mixed)
    logps, _ = sft.reply_logps(student, rows, images)
    naive = [p for row in rows for p in naive_logps(student, row)]
    torch.testing.assert_close(logps, torch.stack(naive), atol=1e-4, rtol=0)


@torch.no_grad()
def test_sampler_and_learner_agree(qwen3_vl, mixed):
    """In 4 bits: rollouts with the cache and the dense copy, against reply_logps."""
    student = load(qwen3_vl, nf4=True)
    dense = grpo.dense_copy(student)
    grpo.merge_adapter(student, dense)
    rollouts = play(student, mixed, lm=dense)
    assert_sampled_with(sft.reply_logps(student, rollouts, images_of(student, mixed))[0], rollouts)


def test_the_product_of_a_gpu_keeps_the_bias(qwen3_vl, pictures):
    student = sft.load_student(qwen3_vl, nf4=False)
    expected = sft.encode_images(student, pictures)
    sft.patches_by_product(student.base)
    student.base.model.visual.patch_embed.proj._conv_forward = None     # must not be called
    for path, features in sft.encode_images(student, pictures).items():
        torch.testing.assert_close(features, expected[path], atol=1e-4, rtol=1e-4)
