"""Logged metrics and files, read back: from the files of an offline run of wandb, and from a server of MLflow."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from byol_fast import config as configs
from byol_fast.config import Config
from byol_fast.report.callback import ReportCallback
from byol_fast.training import tracking
from byol_fast.training.errors import Interrupted
from byol_fast.training.metrics_file import read
from byol_fast.training.trainer import Trainer
from tests.training.conftest import small, small_network  # noqa: F401 (fixtures)
from tests.training.helpers import AtStep
from tests.training.test_tracking import named

pytestmark = pytest.mark.peers


@pytest.fixture
def config(small: Config, monkeypatch: pytest.MonkeyPatch) -> Config:  # noqa: F811
    """A run with evaluations, which waits as long for its trackers as they need."""
    for name in ("END_SECONDS", "INTERRUPTED_SECONDS"):
        monkeypatch.setattr(tracking, name, 300.0)
    return configs.replace(small, {"knn.val_root": small.data.root, "knn.every_epochs": 1})


def run_with_a_break(config: Config) -> Path:
    """Train to the end, interrupted after four of six steps."""
    trainer = Trainer(config, callbacks=[AtStep(4, lambda: signal.raise_signal(signal.SIGTERM))])
    with pytest.raises(Interrupted):
        trainer.fit()
    return Trainer(config, resume=trainer.run_dir, callbacks=[ReportCallback()]).fit().run_dir


def expected(run_dir: Path) -> dict[str, dict[int, Any]]:
    """The values of metrics.jsonl, by the trackers' names and by step."""
    curves: dict[str, dict[int, Any]] = {}
    for record in read(run_dir / "metrics.jsonl"):
        for name, value in named(record).items():
            curves.setdefault(name, {})[record["step"]] = pytest.approx(value, rel=1e-12)
    assert {"train/loss", "eval/knn_top1", "perf/images_per_second"} < set(curves)
    return curves


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a `.wandb` file: a header of 7 bytes, and LevelDB's log format with wandb's own protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if (rest := 2**15 - position % 2**15) < 7:  # the end of a block holds no record
            position += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in {1, 4}:  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def test_wandb_offline(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "project of the environment")
    run_dir = run_with_a_break(configs.replace(config, {"log": ["wandb"]}))
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    records = [record for path in files for record in wandb_records(path)]

    runs = [record.run for record in records if record.HasField("run")]
    identifier = (run_dir / "trackers" / "wandb").read_text().strip()
    assert {(r.run_id, r.display_name, r.project) for r in runs} == {(identifier, "tiny", "project of the environment")}
    stored = {update.key: json.loads(update.value_json) for update in runs[0].config.update}
    assert stored.items() >= json.loads((run_dir / "config.json").read_text()).items()
    assert stored["environment"] == json.loads((run_dir / "environment.json").read_text())
    history: dict[str, dict[int, float]] = {}
    for record in records:
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in items.items():
                if not name.startswith("_"):
                    history.setdefault(name, {})[items["_step"]] = value
    assert history == expected(run_dir)
    files_of_artifacts = {
        entry.path for r in records if r.HasField("artifact") for entry in r.artifact.manifest.contents
    }
    assert files_of_artifacts == {"config.json", "environment.json", "report.html"}
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1, 0]


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """Address of a server of its own, with an empty database."""
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination", f"{tmp_path}/a"]
    with (tmp_path / "server.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=10).close()
                break
            except OSError:
                time.sleep(0.2)  # the server has no other sign of being ready
        else:
            pytest.fail((tmp_path / "server.txt").read_text())
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def test_mlflow_server(config: Config, mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "experiment of the environment")
    run_dir = run_with_a_break(configs.replace(config, {"log": ["mlflow"]}))

    client = mlflow.MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("experiment of the environment")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (run_dir / "trackers" / "mlflow").read_text().strip()
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    params = run.data.params
    assert (params["recipe"], params["optim.lr"]) == ("cifar10_resnet18", str(config.optim.lr))
    assert params["environment.packages.torch"]
    history = {
        name: {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        for name in run.data.metrics
    }
    assert history == expected(run_dir)
    assert {entry.path for entry in client.list_artifacts(run.info.run_id)} == {
        "config.json",
        "environment.json",
        "report.html",
    }
    page = Path(client.download_artifacts(run.info.run_id, "report.html", str(run_dir / "checkpoints")))
    assert page.read_text() == (run_dir / "report.html").read_text()
