"""Error messages of storages: what the disk, the object store or the connection said, and what to do about it.

When to add here: advice for another error, in `_ADVICE`. Keep out: what is not an error, as a lost race.
"""

import contextlib
import re
from collections.abc import Iterator

from songvec_assets.errors import StorageError, UnwritableError

_GO_ON = "then start the same command again: what was stored is kept"

_ANSWER = r"<\?xml|<Error"

_ADVICE = {
    "storage.expired": {
        r"ExpiredToken|RequestExpired|TokenRefreshRequired|token (has|is) expired": "the credentials have expired: "
        f"renew them, {_GO_ON}",
        r"RequestTimeTooSkewed": f"this machine's clock is wrong: set it, {_GO_ON}",
    },
    "storage.no-bucket": {
        r"NoSuchBucket|ContainerNotFound|specified bucket does not exist|InvalidBucketName": "there is no such bucket: "
        "create it, or correct SONGVEC_STORAGE, AWS_REGION or AWS_ENDPOINT_URL",
        r"PermanentRedirect|AuthorizationHeaderMalformed|BareRedirect|redirect": "the bucket is in another region: "
        "correct AWS_REGION",
    },
    "storage.denied": {
        r"Account must be specified": "the account is not named: set AZURE_STORAGE_ACCOUNT_NAME",
        r"169\.254\.|metadata\.google|credential": "no credentials were found: set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, GOOGLE_SERVICE_ACCOUNT or AZURE_STORAGE_ACCOUNT_KEY, or run where a role gives them",
        r"AccessDenied|Forbidden|(code:|status) 40[13]|SignatureDoesNotMatch|InvalidAccessKeyId|Unauthorized": "the "
        "credentials do not allow it: correct them, or allow to get, put, list and delete objects of this prefix",
    },
    "storage.unreachable": {
        r"(code:|status) 5\d\d|SlowDown|InternalError": "the object store fails: wait until it answers "
        f"again, {_GO_ON}",
        r"error sending request|connect|dns|timed? ?out|reset|closed|decoding|body|ends after": "the object store "
        f"cannot be reached, or breaks off: check the network and AWS_ENDPOINT_URL, {_GO_ON}",
    },
}


def read_storage_error(what: str, error: BaseException) -> StorageError:
    """What a failed request means.

    Args:
        what: the operation and its object, such as `read s3://…`.
        error: of the client. What it says of the request's signature is left out.
    """
    # its first part: the rest, for programmers, may hold a session token
    said, _, _ = str(error).partition("\n\nDebug source")
    found = " ".join(re.findall(r"<(?:Code|Message)>([^<]*)<", said))
    words = " ".join(f"{re.split(_ANSWER, said)[0]} {found}".split())[:1000]
    # names that people gave are no reasons
    reasons = re.sub(r"://(?!169\.254|metadata)\S+", "://", words)
    for code, advice in _ADVICE.items():
        for pattern, cure in advice.items():
            if re.search(pattern, reasons, re.IGNORECASE):
                return StorageError(f"could not {what}: {cure}. It said: {words}", code)
    return StorageError(f"could not {what}: {words}", "storage.failed")


@contextlib.contextmanager
def clear_errors(what: str, may_lose: bool = False) -> Iterator[None]:
    """Turn errors of the client into StorageError; a missing object stays FileNotFoundError.

    Args:
        what: see `read_storage_error`.
        may_lose: whether another writer may be first: that error stays as it is.
    """
    from obstore import exceptions

    try:
        yield
    except (exceptions.PreconditionError, exceptions.AlreadyExistsError) as error:
        if not may_lose:
            raise read_storage_error(what, error) from None
        raise
    except FileNotFoundError as error:
        found = read_storage_error(what, error)
        if found.code != "storage.no-bucket":
            raise
        raise found from None
    except (exceptions.BaseError, OSError, NotImplementedError) as error:
        raise read_storage_error(what, error) from None


@contextlib.contextmanager
def clear_disk_errors(name: object) -> Iterator[None]:
    """Turn errors of the file system into UnwritableError with the name of what is written."""
    try:
        yield
    except OSError as error:
        raise UnwritableError(
            f"could not write {name}: {error}. What was stored before is kept: make room, or give access, and start "
            "the same command again"
        ) from error
