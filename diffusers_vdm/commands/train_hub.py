"""The Hub in train.py: the repository, uploads during training, and a checkpoint from another machine."""

from __future__ import annotations

import shutil

STOP_SECONDS = 20  # less than the 30 that schedulers and launchers usually allow


class Sharing:
    """The uploads of a run; it does nothing without --push_to_hub, or on processes other than the main one."""

    def __init__(self, run):
        self.run, self.uploads, self.failure = run, None, None
        if run.args.push_to_hub and run.accelerator.is_main_process:
            self.uploads = self._open()

    def _open(self):
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

        from ..sharing.publish import keep_edited_card
        from ..sharing.uploads import Uploads, remove_left_overs
        from ..training.checkpoints import list_checkpoints

        args, out = self.run.args, self.run.out
        remove_left_overs(out)  # left by a killed process
        if not are_progress_bars_disabled():  # they would interfere with that of the training
            disable_progress_bars()
        uploads = Uploads(
            args.hub_model_id or out.resolve().name,
            private=args.hub_private_repo or None,
            token=args.hub_token,
            before_upload=lambda folder, repo_id: keep_edited_card(folder, repo_id, args.hub_token),
        )
        try:
            uploads.create()
        except OSError as error:  # a run that has checkpoints continues without the Hub
            if not list_checkpoints(out):
                raise
            print(f"the run continues, and each save tries to reach the Hub again: {error}")
        return uploads

    def fetch(self) -> None:
        """For --resume_from_checkpoint last-checkpoint: downloads the Hub's, if it is newer than the local ones."""
        from ..sharing.uploads import fetch_checkpoint
        from ..training.checkpoints import check_same_run, list_checkpoints

        if self.uploads is None:
            return
        run, args = self.run, self.run.args
        same = lambda state: check_same_run(state["run"], run.description().to_json(), args.allow_changed or ())  # noqa: E731
        try:
            folder = fetch_checkpoint(self.uploads.repo_id, run.out, token=args.hub_token, check=same)
        except OSError as error:
            if not list_checkpoints(self.run.out):
                raise OSError(
                    f"{error} There is no local checkpoint either, and a new run would replace it"
                ) from error
            print(f"{error} The newest local checkpoint is used")
            return
        if folder is not None:
            print(f"{folder} was downloaded from {self.uploads.repo_id}")

    def is_due(self, saved: bool, at_end: bool) -> bool:
        """Whether to upload after this step; the same on all processes."""
        args = self.run.args
        return args.push_to_hub and (at_end or (saved and args.hub_strategy != "end"))

    def push(self, title: str) -> None:
        """Queues the content of output_dir with a card and, for --hub_strategy checkpoint, the newest checkpoint."""
        from .. import VDMPipeline
        from ..sharing.model_card import load_quietly
        from ..sharing.publish import add_card_and_code
        from ..sharing.uploads import stage
        from ..training.checkpoints import list_checkpoints

        if self.uploads is None:
            return
        args = self.run.args
        checkpoints, staged = list_checkpoints(self.run.out) if args.hub_strategy == "checkpoint" else [], None
        try:
            staged = stage(self.run.out, checkpoints[-1] if checkpoints else None)
            if (staged / "model_index.json").exists():  # a run that is stopped early has no pipeline yet
                of_step = self.run.step if self.run.step < self.run.total else None
                card = {"include_code": args.hub_include_code, "license": args.hub_license, "step": of_step}
                add_card_and_code(load_quietly(VDMPipeline, staged), staged, self.uploads.repo_id, **card)
            self.uploads.push(staged, f"{title}, step {self.run.step}")
            self.failure = None
        except (OSError, ValueError) as error:  # a full disk
            if staged is not None:
                shutil.rmtree(staged, ignore_errors=True)
            self.failure = str(error)
            print(f"nothing is uploaded at step {self.run.step}: {error}")

    def stop(self) -> None:
        """Uploads what was saved last, if it takes only seconds, because a stopped program may soon be killed."""
        if not self.is_due(saved=True, at_end=False):
            return
        self.push("stopped")
        if self.uploads is None:
            return
        failure = self.uploads.wait(STOP_SECONDS)
        if failure:
            print(f"the last save was not uploaded: {failure}")
            self.uploads.close()

    def wait(self) -> None:
        """Waits for the uploads, until a signal arrives; raises `OSError` with advice if they failed."""
        from ..training.stopping import Stopped, StopRequest

        if self.uploads is None:
            return
        repo, again = self.uploads.repo_id, "to try again, repeat the command with --resume_from_checkpoint latest"
        print(f"waiting for the upload to {repo}", flush=True)
        try:
            with StopRequest() as request, request.at_once():
                failure = self.failure or self.uploads.wait(60)
                while self.uploads.is_busy:
                    print(f"still waiting for the upload to {repo}; Ctrl-C stops waiting", flush=True)
                    failure = self.uploads.wait(600)
        except Stopped:
            self.uploads.close()
            return print(f"the upload was canceled; {again}")
        if failure is not None:
            raise OSError(
                f"the run is complete in {self.run.out}, but its upload to {repo} failed: {failure}; {again}"
            )
        print(f"uploaded to {repo}")
