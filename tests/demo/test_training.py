"""The training command: killed and started again, it ends with the weights of an unbroken run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from demo.train import QUICK, train
from demo.train_language import load_batch
from demo.train_m3 import main as train_m3
from demo.training import Stage, run_stage
from demo.vision_data import WINDOWS_PER_SCENE, whole_batch, window_batch
from demo.world import GRID, scene_at

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums are split by thread; the same weights need the same number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(tmp_path):
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    command = [sys.executable, "-m", "demo.train", "--quick", "--device", "cpu", "--out", str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (killed / "words.pt").is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "metrics.json").exists()

    resumed, straight = [], []
    train(killed, QUICK, device=CPU, log=resumed.append)
    metrics = train(unbroken, QUICK, device=CPU, log=straight.append)
    assert "vision" not in {entry["stage"] for entry in resumed}
    assert len(resumed) < len(straight)
    ours, theirs = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (killed, unbroken))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=0, rtol=0)
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in ours
    assert json.loads((killed / "metrics.json").read_text()) == metrics


def test_a_folder_begun_with_another_plan_or_seed_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="out must be"):
        train(tmp_path, QUICK, device=CPU, log=print)
    with pytest.raises(ValueError, match="seed must be"):
        train(tmp_path / "new", QUICK, seed=256, device=CPU, log=print)


def test_a_stage_resumes_from_any_saved_step_with_its_optimizer(tmp_path):
    stage = Stage(name="fit", steps=9, lr=0.1, warmup=2, log_every=1, save_every=2)
    target = torch.tensor([1.0, -2.0, 3.0])

    def run(folder, stop=None):
        folder.mkdir(exist_ok=True)
        trained = nn.ModuleDict({"line": nn.Linear(1, 3)})
        nn.init.zeros_(trained["line"].weight)
        nn.init.zeros_(trained["line"].bias)

        def loss_at(step):
            if step == stop:
                raise KeyboardInterrupt
            return (trained["line"](torch.tensor([float(step)])) - target).square().sum(), {}

        run_stage(stage, trained, loss_at, folder, lambda entry: None)
        return trained.state_dict()

    unbroken = run(tmp_path / "unbroken")
    for stop in (1, 4, 7):
        folder = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            run(folder, stop)
        for name, tensor in run(folder).items():
            torch.testing.assert_close(tensor, unbroken[name], atol=0, rtol=0)


def test_a_window_is_a_cut_of_its_whole_image():
    scenes = [scene_at("train", index) for index in range(3)]
    windows, whole = window_batch(scenes, np.random.default_rng(0)), whole_batch(scenes)
    for number, (pixels, places) in enumerate(zip(windows.pixels, windows.places, strict=True)):
        source = number // WINDOWS_PER_SCENE
        top, left = divmod(int(places[0]), GRID)
        side = pixels.shape[0]
        np.testing.assert_array_equal(pixels, whole.pixels[source][top * 14 :, left * 14 :][:side, :side])
        np.testing.assert_array_equal(windows.labels[number], whole.labels[source][places])
        np.testing.assert_array_equal(windows.masks[number], whole.masks[source][places])


def test_thinned_training_images_lose_background_before_any_item():
    rng = np.random.default_rng(0)
    occupied = rng.random((4, GRID**2)) < 0.1
    bits = torch.arange(4 * GRID**2).reshape(4, -1, 1).expand(-1, -1, 128).bfloat16() * 0
    bits[torch.from_numpy(occupied)] = 1
    kept = load_batch(bits.view(torch.int16).numpy(), occupied, np.arange(4), 64, rng)
    assert kept.shape == (4, 64, 128)
    np.testing.assert_array_equal(kept[..., 0].sum(1).numpy(), occupied.sum(1))


def test_the_m3_variant_learns_on_pooled_grids_and_leaves_the_tower_alone(tmp_path, demo_model):
    assert train_m3(["--out", str(tmp_path), "--steps", "2", "--scenes", "2", "--cached", "4"]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (demo_model, tmp_path / "checkpoint"))
    assert before.keys() == after.keys()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model", "multi_modal_projector"}
