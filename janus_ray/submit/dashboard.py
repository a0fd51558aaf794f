"""The dashboard of a Ray cluster, which takes jobs: finding it, and saying in one line why it cannot be used."""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

from janus_ray.env import dashboard_address, is_remote, ray_token
from janus_ray.errors import ConfigError, GenerationError
from janus_ray.text import one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_TIMEOUT_S = 10.0
_SHOWN_CHARACTERS = 300
TOKEN_ADVICE = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"


class Known(NamedTuple):
    """What a cluster knows of a job."""

    submission_id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
    message: str = ""
    error_type: str = ""
    """Ray's name for what went wrong, where it was not the job."""
    exit_code: int | None = None
    """Of the job's own process, once that has ended by itself."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status not in ("PENDING", "RUNNING")


def connected(address: str | None) -> JobSubmissionClient:
    """A client of the dashboard, once it has said that it is one and runs our version of Ray.

    Args:
        address: "http://host:8265"; None takes the environment's, or this machine's.

    Raises:
        ConfigError: no dashboard is there, it wants another token, or its cluster runs another version of Ray.
    """
    url = _url(address or dashboard_address())
    theirs, ours = _ray_version(url), version("ray")
    if theirs != ours:
        raise ConfigError(f"{url}: its cluster runs Ray {theirs}, this environment has {ours}; use the same")
    # Ray's client would take these rather than what it is given.
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    client = JobSubmissionClient(url)
    # The first question that needs a token.
    details(client, "none")
    return client


def _url(address: str) -> str:
    if address.startswith("ray://"):
        raise ConfigError(f"{address}: is a Ray Client address; jobs go to the dashboard: --address http://HOST:8265")
    if not is_remote(address):
        address = f"http://{address}"
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"{address}: expected the address of a dashboard, http://HOST:8265")
    return address.rstrip("/")


def _ray_version(url: str) -> str:
    """What the dashboard says of itself.

    Raises:
        ConfigError: there is none, or it wants a token.
    """
    import requests

    token = ray_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    hint = "the dashboard's port is 8265 unless `ray start` said otherwise"
    try:
        answer = requests.get(f"{url}/api/version", timeout=_TIMEOUT_S, headers=headers, allow_redirects=False)
    except requests.Timeout:
        raise ConfigError(
            f"{url}: no dashboard of a Ray cluster answers there (nothing for {_TIMEOUT_S:g} s)"
        ) from None
    # An address that is none is a ValueError of theirs, and a host that cannot be encoded one of Python's.
    except (requests.RequestException, UnicodeError) as error:
        raise ConfigError(f"{url}: no dashboard of a Ray cluster answers there ({_reason(error)}); {hint}") from None
    if answer.status_code in (401, 403):
        raise ConfigError(f"{url}: the cluster {_refusal(answer.status_code)}; {TOKEN_ADVICE}")
    try:
        stated = answer.json()
    except ValueError:
        stated = None
    found = stated.get("ray_version") if isinstance(stated, dict) else None
    if answer.status_code != 200 or not isinstance(found, str):
        raise ConfigError(f"{url}: what answers there is not the dashboard of a Ray cluster; {hint}")
    return found


def _refusal(status: int) -> str:
    return "asks for a token" if status == 401 else "does not take our token"


def _reason(error: BaseException) -> str:
    """What the system said, behind what was made of it: requests wraps urllib3, which wraps the system's."""
    text = str(error)
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror.lower()
        if type(found).__name__ in ("BadStatusLine", "InvalidHeader", "RemoteDisconnected", "LineTooLong"):
            return "what listens there does not speak HTTP"
        wrapped = [getattr(found, "reason", None), *found.args, found.__cause__]
        found = next((one for one in wrapped if isinstance(one, BaseException)), None)
        text = str(found or text)
    return one_line(text.rpartition(": ")[2], _SHOWN_CHARACTERS)


def details(client: JobSubmissionClient, submission_id: str) -> Known | None:
    """What the cluster knows of a job; None where it knows none of that name.

    Raises:
        ConfigError: the cluster wants another token.
        ConnectionError: it does not answer.
        GenerationError: it answers something else.
    """
    import requests
    from ray.exceptions import AuthenticationError

    try:
        found: Any = client.get_job_info(submission_id)
    except AuthenticationError as error:
        status = 401 if "required" in str(error) else 403
        raise ConfigError(f"{client.get_address()}: the cluster {_refusal(status)}; {TOKEN_ADVICE}") from None
    except (requests.ConnectionError, requests.Timeout) as error:
        raise ConnectionError(_reason(error)) from None
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        if "status code 5" in str(error):
            # A dashboard that is starting again, or a proxy before one.
            raise ConnectionError(_short(error)) from None
        raise GenerationError(f"{client.get_address()}: {_short(error)}") from None
    # Enumerations that print themselves differently from one version of Python to the next.
    status, error_type = (str(getattr(value, "value", value) or "") for value in (found.status, found.error_type))
    return Known(submission_id, status, found.message or "", error_type, found.driver_exit_code)


def _short(error: Exception) -> str:
    return one_line(str(error), _SHOWN_CHARACTERS)
