"""Runs of several processes, one after the other: `python tests/ranks.py JOBS.json`.

The imports are made once, and every rank of every job is a fork of this process. A job is `name`, `world`, `words` for
`hf-pm`, and if need be `env`, `kill_when`: a glob pattern at whose first match every rank gets a SIGKILL, `fails`:
`user` or `other`, the kind of error that solving raises, and `untrained`: adapters are drawn in the place of trained,
so that several jobs measure and merge the same. What the ranks said is in NAME.log beside the jobs, their exit codes
in NAME.json.
"""

import faulthandler
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from glob import glob
from hashlib import sha256
from pathlib import Path


PATIENCE = 240  # seconds for one job


def main() -> None:
    import torch

    import hf_pm.loading  # noqa: F401 - for the forks

    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    for job in json.loads(path.read_text()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [start(job, rank, port, path.parent) for rank in range(job["world"])]
        codes = wait(ranks, job.get("kill_when"))
        (path.parent / f"{job['name']}.json").write_text(json.dumps(codes))


def start(job: dict, rank: int, port: int, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        log = os.open(folder / f"{job['name']}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        os.environ |= job.get("env", {})
        if job["world"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {name: str(job["world"]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
            os.environ["MASTER_PORT"] = str(port)
        code = run(job["words"], rank, job.get("fails"), job.get("untrained", False))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(words: list[str], rank: int, fails: str | None = None, untrained: bool = False) -> int:
    import torch
    from torch.distributed.tensor import DTensor

    import hf_pm.cli
    from hf_pm.errors import UserError
    from hf_pm.methods.parity import Parity
    from hf_pm.methods.parts import Parts
    from hf_pm.tasks.encoding import IGNORE_INDEX
    from hf_pm.trainer import PMTrainerMixin

    def tell(word, what):  # noqa: ANN001, ANN202
        # One write: the ranks share the file, and `print` may make several.
        os.write(1, f"\n{word} {json.dumps(what)}\n".encode())

    def stream(trainer, go=PMTrainerMixin.train_stream):  # noqa: ANN001, ANN202
        base = {name: p for name, p in trainer.model.named_parameters() if ".lora_" not in name}
        shards = {name: p for name, p in base.items() if isinstance(p, DTensor)}
        here = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in base.values())
        engine = trainer.accelerator.distributed_type.value
        told = {"rank": rank, "engine": engine, "base": len(base), "sharded": len(shards), "here": here}
        told |= {"world": trainer.accelerator.num_processes, "micro": trainer.args.gradient_accumulation_steps}
        tell("SHARDS", told | {"whole": sum(p.numel() for p in base.values())})
        return go(trainer)

    def step(trainer, model, inputs, *given, go=PMTrainerMixin.training_step):  # noqa: ANN001, ANN002, ANN202
        labels, ids = inputs["labels"], inputs["input_ids"]
        if "attention_mask" in inputs:
            learned = (labels != IGNORE_INDEX).reshape(len(labels), -1).any(1)  # of a classifier, one label a row
            pairs = zip(ids[learned], inputs["attention_mask"][learned].bool(), strict=True)
            rows = [row[mask] for row, mask in pairs]
        else:  # one after the other, without padding
            starts = (inputs["position_ids"][0] == 0).nonzero()[1:, 0].tolist()
            pairs = zip(ids[0].tensor_split(starts), labels[0].tensor_split(starts), strict=True)
            rows = [row for row, answer in pairs if (answer != IGNORE_INDEX).any()]
        seen = [" ".join(map(str, row.tolist())) for row in rows]
        tell("ROWS", [trainer.task_number, trainer.state.global_step, seen])
        return go(trainer, model, inputs, *given)

    def solve(parts, ended, go=Parts.solve):  # noqa: ANN001, ANN202
        tell("SOLVED", [rank, ended.number])
        if fails is not None:
            raise UserError("No good.") if fails == "user" else RuntimeError("Broken.")
        return go(parts, ended)

    def expect(parity, number, merged, go=Parity.expect):  # noqa: ANN001, ANN202
        adapter = {n: p for n, p in parity.trainer.model.named_parameters() if ".lora_" in n}
        digest = sha256(b"".join(p.detach().numpy().tobytes() for p in adapter.values())).hexdigest()
        told = [rank, number, digest, merged.alpha, merged.per_matrix, merged.record, merged.dense is not None]
        tell("MERGED", told)
        return go(parity, number, merged)

    def draw(trainer, number, stage):  # noqa: ANN001, ANN202
        generator = torch.Generator().manual_seed(number)
        for name, parameter in trainer.model.named_parameters():
            if ".lora_B." in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 8
        trainer.live = None
        trainer._costs = {"train_steps": 0, "train_seconds": 0.0, "curvature_seconds": 0.0}

    PMTrainerMixin.train_stream, PMTrainerMixin.training_step = stream, step
    Parts.solve, Parity.expect = solve, expect
    if untrained:
        PMTrainerMixin._train = draw
    code = hf_pm.cli.main(words)
    print("PEAK", rank, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
    return code


def wait(ranks: list[int], kill_when: str | None) -> list[int]:
    codes: dict[int, int] = {}
    while len(codes) < len(ranks):
        if kill_when is not None and glob(kill_when):
            for pid in set(ranks) - codes.keys():
                os.kill(pid, signal.SIGKILL)
            kill_when = None
        for pid in set(ranks) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[pid] for pid in ranks]


if __name__ == "__main__":
    main()
