"""What the clients of object stores say, and what becomes of it."""

import pytest

from songvec_assets.storage.messages import read_storage_error

SIGNED = """Generic S3 error: Client error with status 403 Forbidden: <?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SignatureDoesNotMatch</Code><Message>The request signature we calculated does not match</Message>
<CanonicalRequest>x-amz-security-token:IQoJb3JpZ2luX2VjE</CanonicalRequest></Error>

Debug source:
Generic { headers: "x-amz-security-token: IQoJb3JpZ2luX2VjE" }"""


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (SIGNED, "storage.denied"),
        ("Client error with status 400: <Code>ExpiredToken</Code>", "storage.expired"),
        ("Client error with status 400: <Code>RequestTimeTooSkewed</Code>", "storage.expired"),
        ("Object not found: <Code>NoSuchBucket</Code>", "storage.no-bucket"),
        ("status 404 Not Found: <Code>ContainerNotFound</Code>", "storage.no-bucket"),
        (
            "Received redirect without LOCATION, this normally indicates an incorrectly configured region",
            "storage.no-bucket",
        ),
        ("Generic MicrosoftAzure error: Account must be specified", "storage.denied"),
        ("Error performing PUT http://169.254.169.254/latest/api/token in 2s", "storage.denied"),
        ("Server returned non-2xx status code: 503 Service Unavailable: SlowDown", "storage.unreachable"),
        ("Error performing GET http://127.0.0.1:1/b: error sending request", "storage.unreachable"),
        ("HTTP error: request or response body error", "storage.unreachable"),
        ("in 403.5ms, after 10 retries - HTTP error: error sending request", "storage.unreachable"),
        ("something new", "storage.failed"),
    ],
)
def test_each_cause_has_a_code_and_a_cure(said, code):
    error = read_storage_error("read s3://bucket/key", RuntimeError(said))
    assert error.code == code
    assert str(error).startswith("could not read s3://bucket/key: ")


def test_nothing_of_a_signature_is_repeated():
    error = str(read_storage_error("read s3://bucket/key", RuntimeError(SIGNED)))
    assert "IQoJ" not in error
    assert "The request signature we calculated does not match" in error
