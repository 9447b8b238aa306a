"""A job whose clients examine what arrives, and record what goes by: ``python job.py FOLDER``."""

import argparse
import tempfile
from pathlib import Path

from net import Net, TamperedNet
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv

from leakatlas.integrations.nvflare import CaptureFilter, LintFilter


def main():
    """Run the job in NVFlare's simulator, two sites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where captures go (absolute)")
    parser.add_argument("--workspace", default=str(Path(tempfile.gettempdir()) / "nvflare"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tamper", action="store_true", help="be a malicious server")
    options = parser.parse_args()
    recipe = FedAvgRecipe(
        name="captured",
        model=TamperedNet() if options.tamper else Net(),
        min_clients=2,
        num_rounds=options.rounds,
        train_script="client.py",
    )
    recipe.add_client_input_filter(LintFilter(), tasks=["train"])
    recipe.add_client_input_filter(CaptureFilter(options.folder), tasks=["train"])
    recipe.add_client_output_filter(CaptureFilter(options.folder), tasks=["train"])
    run = recipe.execute(SimEnv(num_clients=2, workspace_root=options.workspace))
    print("Result:", run.get_result())


if __name__ == "__main__":
    main()
