"""A notification through a webhook: Slack, Mattermost, Teams, or anything that takes {"text": ...} by POST."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from detkernel import Run, hookimpl, option, plugin


@plugin(resume_neutral=("*",))
class Webhook:
    """Post a message when a validation, the run, or an attempt at it is over."""

    url: str = option(help="where to post; ${env:WEBHOOK_URL} keeps it out of the config")
    timeout: float = option(default=5.0, above=0, help="seconds to wait for an answer")

    @hookimpl(trylast=True)
    def after_val_epoch(self, run: Run) -> None:
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in list(run.metrics.items())[:3])
        self._post(run, f"{run.work_dir.name}, iteration {run.iter}: {metrics or 'validated'}")

    @hookimpl
    def on_error(self, run: Run, error: BaseException) -> None:
        self._post(run, f"{run.work_dir.name} failed in iteration {run.iter}: {type(error).__name__}: {error}")

    @hookimpl
    def after_run(self, run: Run) -> None:
        if run.error is None:
            self._post(run, f"{run.work_dir.name} is done: {run.stop_reason or f'{run.iter} iterations'}")

    def _post(self, run: Run, text: str) -> None:
        if not run.is_main or run.checking:
            return
        body = json.dumps({"text": text}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(request, timeout=self.timeout).close()
        except (urllib.error.URLError, TimeoutError, ValueError) as error:  # news that is lost must not stop a run
            run.log.warning("webhook: not delivered (%s): %s", error, text)
