"""What train.py does with the Hub: a repository, uploads while it trains, and its checkpoint from another machine."""

from __future__ import annotations

import shutil

STOP_SECONDS = 20  # of the 30 that schedulers and launchers leave as a rule


class Sharing:
    """The uploads of a run: nothing at all without --push_to_hub, and on all processes but the main one."""

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
        remove_left_overs(out)  # of a process that was killed
        if not are_progress_bars_disabled():  # they would run into that of the training
            disable_progress_bars()
        uploads = Uploads(
            args.hub_model_id or out.resolve().name,
            private=args.hub_private_repo or None,
            token=args.hub_token,
            before_upload=lambda folder, repo_id: keep_edited_card(folder, repo_id, args.hub_token),
        )
        try:
            uploads.create()
        except OSError as error:  # a run that is under way goes on without
            if not list_checkpoints(out):
                raise
            print(f"the run goes on, and each save tries again to reach the Hub: {error}")
        return uploads

    def fetch(self) -> None:
        """For --resume_from_checkpoint last-checkpoint: the Hub's, if it is newer than what is here."""
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
                raise OSError(f"{error} There is no checkpoint here either: a new run would take its place") from error
            print(f"{error} The newest one here is taken")
            return
        if folder is not None:
            print(f"{folder} came from {self.uploads.repo_id}")

    def is_due(self, saved: bool, at_end: bool) -> bool:
        """Whether something goes to the Hub after this step, of all processes alike."""
        args = self.run.args
        return args.push_to_hub and (at_end or (saved and args.hub_strategy != "end"))

    def push(self, title: str) -> None:
        """Hands over what output_dir holds now with a card, and the newest checkpoint by --hub_strategy checkpoint."""
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
            if (staged / "model_index.json").exists():  # a run that is stopped early has none yet
                of_step = self.run.step if self.run.step < self.run.total else None
                card = {"include_code": args.hub_include_code, "license": args.hub_license, "step": of_step}
                add_card_and_code(load_quietly(VDMPipeline, staged), staged, self.uploads.repo_id, **card)
            self.uploads.push(staged, f"{title}, step {self.run.step}")
            self.failure = None
        except (OSError, ValueError) as error:  # a full disk
            if staged is not None:
                shutil.rmtree(staged, ignore_errors=True)
            self.failure = str(error)
            print(f"nothing goes to the Hub at step {self.run.step}: {error}")

    def stop(self) -> None:
        """Sends what was saved last, if it takes seconds only: whoever ends the program will not wait for long."""
        if not self.is_due(saved=True, at_end=False):
            return
        self.push("stopped")
        failure = self.uploads.wait(STOP_SECONDS) if self.uploads is not None else None
        if failure and self.uploads is not None:
            print(f"it is not on the Hub: {failure}")
            self.uploads.close()

    def wait(self) -> None:
        """Until all is there, or somebody ends the wait; `OSError` with what to do if it failed."""
        from ..training.stopping import Stopped, StopRequest

        if self.uploads is None:
            return
        repo, again = self.uploads.repo_id, "the same command with --resume_from_checkpoint latest tries again"
        print(f"waiting for the upload to {repo}", flush=True)
        try:
            with StopRequest() as request, request.at_once():
                failure = self.failure or self.uploads.wait(60)
                while self.uploads.is_busy:
                    print(f"still waiting for the upload to {repo}; Ctrl-C ends it", flush=True)
                    failure = self.uploads.wait(600)
        except Stopped:
            self.uploads.close()
            return print(f"the upload was not waited for; {again}")
        if failure is not None:
            raise OSError(f"the run is whole in {self.run.out}, but its upload to {repo} failed: {failure}; {again}")
        print(f"uploaded to {repo}")
