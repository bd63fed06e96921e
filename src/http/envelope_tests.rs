//! Reading requests: what is tolerated, what is refused, and with which words.

use super::*;
use http::StatusCode;

async fn call(request: http::request::Builder, body: impl Into<Body>) -> Result<Call, ApiError> {
    Call::from_request(request.body(body.into()).unwrap(), &()).await
}

async fn post(body: &'static [u8]) -> Result<Call, ApiError> {
    call(
        Request::builder()
            .method("POST")
            .uri("/x?tag=a%2Bb+c&tag=second&n=7"),
        body,
    )
    .await
}

#[tokio::test]
async fn bodies_of_any_type_and_charset() {
    for kind in [
        "application/json",
        "application/x-www-form-urlencoded",
        "text/plain",
        "",
    ] {
        let request = Request::builder()
            .method("POST")
            .uri("/x")
            .header("content-type", kind);
        let call = call(request, r#"{"id":"a","unknown":[{}]}"#).await.unwrap();
        assert_eq!(call.text("id").unwrap().unwrap(), "a");
    }
    let latin1 = post(b"{\"name\":\"caf\xe9\"}").await.unwrap();
    assert_eq!(latin1.text("name").unwrap().unwrap(), "caf\u{fffd}");
    for nothing in [&b""[..], b" \r\n", b"null", b"{}"] {
        assert!(post(nothing).await.unwrap().text("id").unwrap().is_none());
    }
}

#[tokio::test]
async fn members_come_from_body_then_query_and_null_is_absent() {
    let call = post(br#"{"n":null,"e":"","id":"x"}"#).await.unwrap();
    assert_eq!(call.text("tag").unwrap().unwrap(), "a+b c");
    assert_eq!(call.int("n", 0..=9).unwrap(), Some(7));
    assert_eq!(call.text("e").unwrap(), None);
    assert_eq!(call.int("e", 1..=2).unwrap(), None);
    assert_eq!(call.flag("e").unwrap(), None);
    assert_eq!(call.required("id").unwrap(), "x");
    assert_eq!(
        call.required("e").unwrap_err(),
        ApiError::bad("e is required")
    );
}

#[tokio::test]
async fn malformed_bodies_are_answered_with_400() {
    let cases: [(&[u8], &str); 6] = [
        (b"{", "the request body is not valid JSON: "),
        (b"id=abc", "the request body is not valid JSON: "),
        (b"{\"a\":1}x", "the request body is not valid JSON: "),
        (b"[]", "the request body must be a JSON object"),
        (b"\"text\"", "the request body must be a JSON object"),
        (b"\xff\xfe", "the request body is not valid JSON: "),
    ];
    for (body, text) in cases {
        let error = post(body).await.unwrap_err();
        assert_eq!(error.status, StatusCode::BAD_REQUEST);
        assert!(error.message.starts_with(text), "{}", error.message);
    }
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    let error = call(Request::builder().method("POST").uri("/x"), deep)
        .await
        .unwrap_err();
    assert!(
        error.message.contains("recursion limit"),
        "{}",
        error.message
    );
}

#[tokio::test]
async fn wrong_types_name_the_member() {
    let call = post(br#"{"t":1,"i":"x","f":1,"l":{},"o":[],"neg":-1,"half":1.5,"big":1e30}"#);
    let call = call.await.unwrap();
    let texts = [
        (call.text("t").unwrap_err(), "t must be a string"),
        (
            call.int("i", 1..=9).unwrap_err(),
            "i must be a whole number from 1 to 9",
        ),
        (
            call.int("neg", 0..=9).unwrap_err(),
            "neg must be a whole number from 0 to 9",
        ),
        (
            call.int("half", 0..=9).unwrap_err(),
            "half must be a whole number from 0 to 9",
        ),
        (
            call.int("big", 0..=9).unwrap_err(),
            "big must be a whole number from 0 to 9",
        ),
        (call.flag("f").unwrap_err(), "f must be true or false"),
        (call.list("l").unwrap_err(), "l must be an array"),
        (call.object("o").unwrap_err(), "o must be an object"),
    ];
    for (error, text) in texts {
        assert_eq!(error, ApiError::bad(text));
    }
}

#[tokio::test]
async fn base64_is_standard_with_padding_and_may_be_wrapped() {
    let call = post(br#"{"a":"aGVs\r\nbG8=","b":"aGVsbG8","c":"_-"}"#)
        .await
        .unwrap();
    assert_eq!(call.base64("a").unwrap().unwrap(), b"hello");
    for bad in ["b", "c"] {
        let error = call.base64(bad).unwrap_err();
        assert_eq!(error.status, StatusCode::OK);
        assert!(
            error
                .message
                .starts_with(&format!("{bad} is not valid base64"))
        );
    }
}

#[tokio::test]
async fn a_huge_body_is_answered_with_the_limit() {
    let size = REQUEST_BODY_BYTES_MAX + 1;
    let chunks = futures::stream::iter(
        std::iter::repeat_n(Bytes::from(vec![b' '; 64 << 10]), size.div_ceil(64 << 10))
            .map(Ok::<_, std::io::Error>),
    );
    let chunked = call(
        Request::builder().method("POST").uri("/x"),
        Body::from_stream(chunks),
    )
    .await;
    let whole = call(Request::builder().method("PUT").uri("/x"), vec![b' '; size]).await;
    for error in [chunked.unwrap_err(), whole.unwrap_err()] {
        assert_eq!(error.status, StatusCode::PAYLOAD_TOO_LARGE);
        assert!(
            error
                .message
                .contains("4194304 bytes (request_body_bytes_max)")
        );
    }
    // One byte less is read: white space is no body.
    let fits = call(
        Request::builder().method("POST").uri("/x"),
        vec![b' '; size - 1],
    )
    .await;
    assert!(fits.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_body_that_never_ends_is_given_up() {
    let stuck = Body::from_stream(futures::stream::pending::<Result<Bytes, std::io::Error>>());
    let error = call(Request::builder().method("POST").uri("/x"), stuck)
        .await
        .unwrap_err();
    assert_eq!(
        error,
        ApiError::bad("the request body did not arrive within 30 s")
    );
}

#[tokio::test]
async fn a_get_ignores_its_body() {
    let call = call(Request::builder().uri("/x?consistency=stale"), "{")
        .await
        .unwrap();
    assert_eq!(call.consistency().unwrap(), Consistency::Stale);
}

#[tokio::test]
async fn the_idempotency_key_fixes_all_ids() {
    let make = async |path: &str, key: &str| {
        let request = Request::builder()
            .method("POST")
            .uri(path)
            .header("Idempotency-Key", key);
        call(request, "").await.unwrap()
    };
    let (a, b) = (make("/x", "k1").await, make("/x", "k1").await);
    assert_eq!(a.command_id(), b.command_id());
    assert_eq!(a.instance_id(0), b.instance_id(0));
    assert_ne!(a.instance_id(0), a.instance_id(1));
    let id = a.instance_id(0).0;
    assert_eq!((id.len(), &id[14..15]), (36, "4"), "a version 4 UUID: {id}");
    assert_ne!(a.command_id(), make("/x", "k2").await.command_id());
    assert_ne!(a.command_id(), make("/y", "k1").await.command_id());
    let none = make("/x", "").await;
    assert_ne!(none.command_id(), none.command_id());
    let long = Request::builder()
        .uri("/x")
        .header("Idempotency-Key", "x".repeat(257));
    assert_eq!(
        call(long, "").await.unwrap_err().status,
        StatusCode::BAD_REQUEST
    );
}
