"""A server and two sites as they are deployed, on this machine: ``python federation.py FOLDER``.

The sites' own policy (``privacy.json``) examines whatever any job sends them. A job cannot opt out:
the policy's filters run before a job's, and a job that names a scope which the policy does not
have is not deployed. ``--tamper --opt-out`` submits a malicious job that brings no filter.
"""

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

from job import fed_job
from nvflare.fuel.flare_api.flare_api import new_secure_session

ADMIN = "admin@nvidia.com"
HERE = Path(__file__).parent


def install_policy(site):
    """What the owner of a site does once: a policy, and leave to load its classes."""
    local = site / "local"
    shutil.copy(HERE / "privacy.json", local)
    resources = json.loads((local / "resources.json.default").read_text())
    resources["class_allow_list"].append("leakatlas.integrations.nvflare")
    (local / "resources.json").write_text(json.dumps(resources, indent=2))


def main():
    """Provision, start, run one job, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where everything goes (absolute)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tamper", action="store_true")
    parser.add_argument("--opt-out", action="store_true")
    parser.add_argument("--guarded", nargs="*", default=["site-1", "site-2"], help="have a policy")
    parser.add_argument("--scope", action="append", help="that a job asks for; one job for each")
    options = parser.parse_args()
    folder = Path(options.folder)
    # NVFlare keeps its settings in the home folder; this federation has one of its own.
    os.environ |= {"HOME": str(folder), "NVFLARE_POC_WORKSPACE": str(folder / "poc")}

    def poc(*words):
        subprocess.run(["nvflare", "poc", *words], check=True)

    poc("prepare", "-n", "2")
    deployed = folder / "poc" / "example_project" / "prod_00"
    for site in options.guarded:
        install_policy(deployed / site)
    job = fed_job(
        str(folder / "captures"),
        rounds=options.rounds,
        tamper=options.tamper,
        opt_out=options.opt_out,
    )
    job.export_job(str(folder / "job"))
    submitted = folder / "job" / "captured"
    meta = submitted / "meta.json"
    poc("start")
    try:
        session = new_secure_session(ADMIN, str(deployed / ADMIN))
        for scope in options.scope or [""]:
            meta.write_text(json.dumps(json.loads(meta.read_text()) | {"scope": scope}))
            number = session.submit_job(str(submitted))
            session.monitor_job(number, timeout=600)
            found = session.get_job_meta(number)
            print(f"Job in scope {scope!r}: {found['status']}; {found['job_deploy_detail']}")
        session.close()
    finally:
        poc("stop", "--no-wait")


if __name__ == "__main__":
    main()
