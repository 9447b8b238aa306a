"""A job whose clients examine what arrives, and record what goes by: ``python job.py FOLDER``.

``--tamper`` makes it a malicious one; ``--opt-out`` leaves its filters out, as that one would.
"""

import argparse
import tempfile
from pathlib import Path

from net import Net, TamperedNet
from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import (
    InTimeAccumulateWeightedAggregator,
)
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import (
    FullModelShareableGenerator,
)
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
from nvflare.app_opt.pt.job_config.model import PTModel
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.job_config.api import FedJob, FilterType
from nvflare.job_config.script_runner import ScriptRunner
from nvflare.recipe import SimEnv

from leakatlas.integrations.nvflare import CaptureFilter, LintFilter


def recipe(folder, *, rounds=2, tamper=False, opt_out=False):
    """FedAvg over two sites as a recipe; captures go into the (absolute) folder."""
    job = FedAvgRecipe(
        name="captured",
        model=TamperedNet() if tamper else Net(),
        min_clients=2,
        num_rounds=rounds,
        train_script="client.py",
    )
    if not opt_out:
        job.add_client_input_filter(LintFilter(), tasks=["train"])
        job.add_client_input_filter(CaptureFilter(folder), tasks=["train"])
        job.add_client_output_filter(CaptureFilter(folder), tasks=["train"])
        job.add_server_output_filter(CaptureFilter(folder, place="server"), tasks=["train"])
        job.add_server_input_filter(CaptureFilter(folder, place="server"), tasks=["train"])
    return job


def fed_job(folder, *, rounds=1, tamper=False, opt_out=False):
    """The same with the job API, and a server that goes on as long as one site answers."""
    job = FedJob(name="captured", min_clients=1)
    persistor = job.to_server(PTModel(TamperedNet() if tamper else Net()))["persistor_id"]
    job.to_server(FullModelShareableGenerator(), id="generator")
    job.to_server(InTimeAccumulateWeightedAggregator(expected_data_kind="WEIGHTS"), id="aggregator")
    workflow = ScatterAndGather(
        min_clients=1,
        num_rounds=rounds,
        wait_time_after_min_received=30,
        aggregator_id="aggregator",
        persistor_id=persistor,
        shareable_generator_id="generator",
    )
    job.to_server(workflow)
    job.to_clients(ScriptRunner(script="client.py"), tasks=["train"])
    if not opt_out:
        data, result = FilterType.TASK_DATA, FilterType.TASK_RESULT
        job.to_clients(LintFilter(), filter_type=data, tasks=["train"])
        job.to_clients(CaptureFilter(folder), filter_type=data, tasks=["train"])
        job.to_clients(CaptureFilter(folder), filter_type=result, tasks=["train"])
    return job


def main():
    """Run the recipe in NVFlare's simulator, two sites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where captures go (absolute)")
    parser.add_argument("--workspace", default=str(Path(tempfile.gettempdir()) / "nvflare"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tamper", action="store_true")
    parser.add_argument("--opt-out", action="store_true")
    options = parser.parse_args()
    job = recipe(
        options.folder, rounds=options.rounds, tamper=options.tamper, opt_out=options.opt_out
    )
    run = job.execute(SimEnv(num_clients=2, workspace_root=options.workspace))
    print("Result:", run.get_result())


if __name__ == "__main__":
    main()
