import pytest
import torch
from helpers import quiet_trainer, read_events, scalar

from bnlightning import ActivationMonitor, BatchNorm1d, LitRegressor, SyntheticRegressionDataModule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_layer_gives_on_the_gpu_what_it_gives_on_the_cpu(backend):
    cpu, gpu = (
        BatchNorm1d(30, convention="keras", backend=backend),
        BatchNorm1d(30, convention="keras", backend=backend),
    )
    gpu.cuda()
    x = torch.randn(200, 30, generator=torch.Generator().manual_seed(0)) * 3 + 10
    a, b = x.clone().requires_grad_(), x.cuda().requires_grad_()
    torch.testing.assert_close(gpu(b).cpu(), cpu(a), rtol=1e-4, atol=1e-4)
    cpu(a).sin().sum().backward()
    gpu(b).sin().sum().backward()
    torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gpu.running_var.cpu(), cpu.running_var, rtol=1e-4, atol=1e-5)


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
