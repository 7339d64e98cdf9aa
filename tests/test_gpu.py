import pytest
import torch
from helpers import quiet_trainer, read_events, run_on_lightning_ranks, run_on_ranks, scalar

from bnlightning import (
    ActivationMonitor,
    BatchNorm1d,
    BatchNorm2d,
    BatchNormMonitor,
    GradientMonitor,
    LitRegressor,
    SyntheticRegressionDataModule,
)
from bnlightning.monitors.catching.finite_check import make_check
from bnlightning.monitors.catching.observer import Observer
from bnlightning.monitors.counting.histogram import count_values
from bnlightning.monitors.counting.layers import LayerAccumulators
from bnlightning.nn import CONVENTIONS, skip_nonfinite_batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("backend", ["fast", "reference"])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_layer_gives_on_the_gpu_what_it_gives_on_the_cpu(backend, convention):
    cpu, gpu = (BatchNorm1d(30, eps=1e-3, momentum=0.3, convention=convention, backend=backend) for _ in range(2))
    gpu.cuda()
    for step in range(3):
        x = torch.randn(200, 30, generator=torch.Generator().manual_seed(step)) * 3 + 10
        a, b = x.clone().requires_grad_(), x.cuda().requires_grad_()
        torch.testing.assert_close(gpu(b).cpu(), cpu(a), rtol=1e-4, atol=1e-4)
        cpu(a).sin().sum().backward()
        gpu(b).sin().sum().backward()
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gpu.cpu().state_dict(), cpu.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"convention": "keras"}, {"convention": "caffe"}, {"momentum": None}], ids=str)
def test_a_training_step_never_waits_for_the_gpu(options):
    layer = BatchNorm2d(8, **options).cuda()
    skip_nonfinite_batches(layer)
    x = torch.randn(4, 8, 5, 5, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_autocast_and_channels_last(dtype, layout):
    conv = torch.nn.Conv2d(3, 8, 3).cuda().to(memory_format=layout)
    layer, exact = BatchNorm2d(8, convention="keras").cuda(), BatchNorm2d(8, convention="keras").double()
    x = torch.randn(4, 3, 16, 16, device="cuda").contiguous(memory_format=layout)
    with torch.autocast("cuda", dtype):
        hidden = conv(x)
        output = layer(hidden)
    assert output.dtype == dtype and output.is_contiguous(memory_format=layout)
    want = exact(hidden.detach().cpu().double())
    torch.testing.assert_close(output.cpu().double(), want, rtol=0, atol=0.05)
    torch.testing.assert_close(layer.cpu().state_dict(), exact.state_dict(), rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_monitor_counts_on_the_gpu_what_it_counts_on_the_cpu(tmp_path):
    events = []
    for accelerator in ("cpu", "gpu"):
        torch.manual_seed(0)
        trainer = quiet_trainer(
            tmp_path / accelerator,
            accelerator=accelerator,
            max_steps=1,
            callbacks=[ActivationMonitor(check_finite_every_n_steps=1)],
        )
        trainer.fit(LitRegressor(activation="relu"), SyntheticRegressionDataModule())
        events.append(read_events(tmp_path / accelerator))
    cpu, gpu = events
    assert cpu.Tags() == gpu.Tags()
    for tag in (tag for tag in cpu.Tags()["scalars"] if tag.startswith("act_")):
        assert list(scalar(gpu, tag).values()) == pytest.approx(list(scalar(cpu, tag).values()), rel=1e-2, abs=1e-2)


def test_monitoring_never_waits_for_the_gpu():
    observer, window = Observer(None, 100), LayerAccumulators()
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), BatchNorm2d(8), torch.nn.Sigmoid(), torch.nn.Flatten()).cuda()
    observer.attach(net, True, torch.device("cuda"))
    observer.check, observer.grad_scale = make_check(torch.device("cuda")), 1.0
    x = torch.randn(4, 3, 9, 9, device="cuda")
    for wait in ("default", "error"):
        # The first pass makes the accumulators.
        torch.cuda.set_sync_debug_mode(wait)
        try:
            observer.check.begin(0)
            observer.start(window)
            net(x).sum().backward()
            observer.check.end()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    observer.detach()


@pytest.mark.parametrize("deterministic", [False, True])
def test_histograms_count_on_the_gpu_what_they_count_on_the_cpu(deterministic):
    x = torch.randn(100_000) * 10.0 ** torch.randn(100_000)
    x[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert torch.equal(count_values(x.cuda()).cpu(), count_values(x))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("convention", ["pytorch", "keras"])
def test_compiled_layer_gives_on_the_gpu_what_it_gives_uncompiled(convention):
    eager, compiled = (BatchNorm2d(8, convention=convention).cuda() for _ in range(2))
    x = torch.randn(4, 8, 6, 6, device="cuda")
    fast = torch.compile(compiled, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(fast(x), eager(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-5)


def publish(rank, directory, strategy):
    torch.manual_seed(0)
    model = LitRegressor(norm_options={"sync": True, "convention": "keras"}, activation="relu")
    monitors = [ActivationMonitor(every_n_steps=1), GradientMonitor(every_n_steps=1), BatchNormMonitor(every_n_steps=1)]
    trainer = quiet_trainer(directory, accelerator="gpu", strategy=strategy, max_steps=2, callbacks=monitors)
    trainer.fit(model, SyntheticRegressionDataModule())


@pytest.mark.slow
def test_one_rank_on_nccl_publishes_what_a_process_without_a_group_publishes(tmp_path):
    events = []
    for strategy in ("auto", "ddp"):
        (tmp_path / strategy).mkdir()
        run_on_lightning_ranks(publish, 1, tmp_path / strategy, tmp_path / strategy, strategy)
        events.append(read_events(tmp_path / strategy))
    one, ddp = events
    assert one.Tags() == ddp.Tags() and one.Tags()["histograms"]
    for tag in one.Tags()["scalars"]:
        assert scalar(ddp, tag) == pytest.approx(scalar(one, tag), rel=1e-3, abs=1e-3), tag


def layer_on_rank(rank, ours):
    torch.cuda.set_device(rank)
    layer = BatchNorm2d(6, sync=True) if ours else torch.nn.SyncBatchNorm(6)
    layer.cuda()
    # Uneven parts of one batch.
    whole = torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 + 3
    x = whole[:2] if rank == 0 else whole[2:]
    x = x.cuda().requires_grad_()
    output = layer(x)
    output.sin().sum().backward()
    return [value.cpu() for value in (output.detach(), x.grad, layer.running_mean, layer.running_var)]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices on this machine")
def test_synchronised_over_gpus_ours_gives_what_torchs_gives(tmp_path):
    results = {}
    for ours in (True, False):
        (tmp_path / str(ours)).mkdir()
        results[ours] = run_on_ranks(layer_on_rank, 2, tmp_path / str(ours), ours, backend="nccl")
    for own, theirs in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)
