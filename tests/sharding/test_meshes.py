"""Eight host devices: the same losses as one device, in every mesh that is built today."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from jaxmem.errors import ConfigError, UnknownName
from jaxmem.parallel.mesh import ParallelConfig, build_mesh, describe_mesh, parse_mesh
from jaxmem.parallel.rules import leaf_spec
from jaxmem.training.run import train
from tests.helpers.tiny_run import rows, tiny_batch, tiny_run
from tests.training.test_step import build

MESHES = ["data=8", "fsdp=8", "data=4,fsdp=2", "data=2,fsdp=4"]


def losses(mesh, *, accumulate=1):
    run = build(mesh=mesh, accumulate=accumulate)
    state, got = run.state, []
    for seed in range(4):
        # The number of scored tokens differs from row to row, so it does from device to device.
        state, report = run.update(state, run.place(tiny_batch(16, seed=seed, scored=0.3)))
        got.append([float(report.loss), float(report.grad_norm)])
    return run, state, np.array(got)


@pytest.fixture(scope="module")
def one_device():
    run, state, got = losses("")
    return run.parts.layout.unstack(jax.device_get(state.params)), got


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_equal_one_device(one_device, mesh):
    params, want = one_device
    run, state, got = losses(mesh)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    single = run.parts.layout.unstack(jax.device_get(state.params))
    chex.assert_trees_all_close(single, params, rtol=1e-4, atol=1e-5)


def test_accumulation_on_a_mesh_equals_one_device(one_device):
    _, _, got = losses("data=4,fsdp=2", accumulate=2)
    np.testing.assert_allclose(got, one_device[1], rtol=2e-6)


def hlo(mesh):
    run = build(mesh=mesh)
    return run.update.lower(run.state, run.place(tiny_batch(16))).compile().as_text()


def test_data_only_step_reduces_and_gathers_nothing():
    text = hlo("data=8")
    assert "all-reduce" in text
    for stray in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert stray not in text


def test_fsdp_step_gathers_parameters_and_scatters_gradients():
    text = hlo("fsdp=8")
    assert "all-gather" in text
    assert "reduce-scatter" in text
    assert "all-to-all" not in text


def test_one_device_step_has_no_collective():
    text = hlo("")
    assert not any(name in text for name in ("all-reduce", "all-gather", "reduce-scatter"))


def test_every_device_holds_its_share_of_parameters_and_moments():
    run = build(mesh="data=2,fsdp=4")
    for tree in (run.state.params, run.state.opt_state[0].mu, run.state.opt_state[0].nu):
        kernel = tree["layers.*.linear.kernel"]  # [2 8 8], axis 0 is the layer
        assert kernel.addressable_shards[0].data.shape == (2, 2, 8)
        assert tree["embed"].addressable_shards[0].data.shape == (11, 2)
    state, _ = run.update(run.state, run.place(tiny_batch(16)))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
        lambda x: x.sharding, run.state
    )


def test_run_moves_from_one_device_to_a_mesh(tmp_path, capsys):
    one = tiny_run(tmp_path / "one")
    one = dataclasses.replace(
        one,
        model=dataclasses.replace(
            one.model, mixer=dataclasses.replace(one.model.mixer, dropout=0.0)
        ),
    )
    train(one)
    moved = dataclasses.replace(one, run=dataclasses.replace(one.run, dir=str(tmp_path / "moved")))
    train(dataclasses.replace(moved, run=dataclasses.replace(moved.run, steps=4)))
    train(dataclasses.replace(moved, parallel=ParallelConfig(mesh="data=4,fsdp=2")))
    assert (
        "the mesh changed: results equal the earlier ones within rounding"
        in capsys.readouterr().out
    )
    for got, want in zip(rows(moved.run.folder), rows(one.run.folder), strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_allclose(
                got[name], value, rtol=2e-5, err_msg=f"{name} {want['step']}"
            )


def test_leaf_spec_takes_the_largest_divisible_axis():
    assert leaf_spec((6, 8, 16), 4) == jax.P(None, None, "fsdp")
    assert leaf_spec((8, 8), 4) == jax.P("fsdp")
    assert leaf_spec((3, 5), 4) == jax.P()
    assert leaf_spec((8, 4), 4, first=1) == jax.P(None, "fsdp")
    assert leaf_spec((8, 4), 1) == jax.P()


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("dat=2", UnknownName, "Did you mean data"),
        ("data", ConfigError, "data=4,fsdp=2"),
        ("data=0", ConfigError, "at least 1"),
        ("data=2,data=2", ConfigError, "is not one axis"),
        ("tensor=2", ConfigError, "not built yet"),
        ("seq=4", ConfigError, "not built yet"),
    ],
)
def test_bad_mesh_text(text, error, words):
    with pytest.raises(error, match=words):
        ParallelConfig(mesh=text)


def test_mesh_larger_than_the_machine_says_how_many_there_are():
    with pytest.raises(ConfigError, match=r"needs 64 devices, found 8 .*device_count=64"):
        build_mesh(ParallelConfig(mesh="data=64"))


def test_mesh_text_and_description():
    assert parse_mesh(" fsdp=2 , data=4") == {"data": 4, "fsdp": 2, "tensor": 1, "seq": 1}
    assert "mesh data=4, fsdp=2" in describe_mesh(build_mesh(ParallelConfig(mesh="data=4,fsdp=2")))
