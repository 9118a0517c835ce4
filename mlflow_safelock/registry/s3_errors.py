"""What S3 and its client say, as one kind of error with a cause and a next step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError, CredentialRetrievalError, NoCredentialsError

from mlflow_safelock.errors import SourceError, UnreachableError

CHANGED = (
    "was changed after it was listed",
    "Let nobody write there, and do it again; register a changed model as a new version.",
)
MISSING = ("is not there", "Look whether it was deleted or moved, or log the model anew.")
FORBIDDEN = (
    "may not be accessed by this process",
    "Give its role s3:ListBucket and s3:GetObject there, and s3:PutObject and s3:DeleteObject beside it.",
)
NOT_KNOWN = (
    "cannot be accessed: the store does not accept this process's credentials",
    "Look at the AWS_* variables or the role of the registry's process.",
)
BUSY = (
    "cannot be reached: the store is overloaded or does not answer",
    "Do it again in a while; AWS_MAX_ATTEMPTS and AWS_RETRY_MODE=adaptive make it more patient.",
)
OTHER = ("cannot be used", "Look at the store and at MLFLOW_S3_ENDPOINT_URL.")

BY_CODE = {
    **dict.fromkeys(("PreconditionFailed", "412", "InvalidRange", "416"), CHANGED),
    **dict.fromkeys(("NoSuchKey", "NoSuchBucket", "NotFound", "404"), MISSING),
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled", "Forbidden", "403"), FORBIDDEN),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401"), NOT_KNOWN
    ),
    **dict.fromkeys(
        ("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "500", "502", "503", "504"),
        BUSY,
    ),
}
"""Cause and next step by the store's error code; an answer without a body has the HTTP status as its code."""


@contextmanager
def s3_errors(what: str) -> Iterator[None]:
    """Turn what the client raises about ``what``, such as ``The file 'x' at s3://…``, into our own error."""
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        raise _error(what, BY_CODE.get(code) or BY_CODE.get(status, OTHER), error) from error
    except (NoCredentialsError, CredentialRetrievalError) as error:
        raise _error(what, NOT_KNOWN, error) from error
    except (BotoCoreError, Boto3Error) as error:
        raise _error(what, BUSY, error) from error


def _error(what: str, means: tuple[str, str], error: Exception) -> SourceError:
    cause, next_step = means
    kind = UnreachableError if means is BUSY else SourceError
    return kind(f"{what} {cause} ({error}).", next_step=next_step)
