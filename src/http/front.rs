//! What happens around routing: repeated slashes, compression, cross-origin answers, and the
//! answers to routes and methods that do not exist. Knows no route.

use super::error::ApiError;
use axum::Router;
use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, StatusCode, Uri, header};
use tower::ServiceExt as _;
use tower_http::compression::predicate::{
    DefaultPredicate, NotForContentType, Predicate as _, SizeAbove,
};
use tower_http::compression::{CompressionLayer, CompressionLevel};

/// Smaller answers are sent as they are: gzip would not spare a packet.
const COMPRESS_BYTES_MIN: u16 = 1024;

/// `routes` with everything around them. The result can be merged with other routers: what they do
/// not know comes here.
pub fn wrap(routes: Router, allow_cors: bool) -> Router {
    let compress = CompressionLayer::new()
        .quality(CompressionLevel::Fastest)
        .compress_when(
            DefaultPredicate::new()
                .and(SizeAbove::new(COMPRESS_BYTES_MIN))
                // A file: its length is announced, and holds for the bytes as they are.
                .and(NotForContentType::const_new("application/octet-stream")),
        );
    let mut routes = routes
        .fallback(async || (StatusCode::NOT_FOUND, "404 page not found\n"))
        .method_not_allowed_fallback(async || ApiError::method())
        .layer(compress);
    if allow_cors {
        routes = routes.layer(middleware::from_fn(cors));
    }
    // Routing happens on the path, so the path is put right in front of a router of its own.
    Router::new().fallback_service(routes.map_request(|mut request: Request| {
        if let Some(uri) = collapsed(request.uri()) {
            *request.uri_mut() = uri;
        }
        request
    }))
}

/// The address with each run of slashes in its path as one; `None` when it has no run.
fn collapsed(uri: &Uri) -> Option<Uri> {
    let path = uri.path();
    if !path.contains("//") {
        return None;
    }
    let mut text = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !text.ends_with('/') {
            text.push(c);
        }
    }
    if let Some(query) = uri.query() {
        text.push('?');
        text.push_str(query);
    }
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(text).ok()?);
    Uri::from_parts(parts).ok()
}

/// Any origin may ask: access is a matter of credentials, not of where a page came from.
async fn cors(request: Request, next: Next) -> Response {
    let preflight = request.method() == Method::OPTIONS
        && request
            .headers()
            .contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if preflight {
        StatusCode::OK.into_response()
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_ORIGIN,
        HeaderValue::from_static("*"),
    );
    if preflight {
        let methods = HeaderValue::from_static("GET, HEAD, POST, PUT, DELETE");
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
        let allowed = HeaderValue::from_static("Authorization, Content-Type, Idempotency-Key");
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use axum::routing::{get, post};
    use http_body_util::BodyExt as _;

    fn app(allow_cors: bool) -> Router {
        let routes = Router::new()
            .route("/a/b", get(async |uri: Uri| uri.to_string()))
            .route("/big", get(async || "x".repeat(5000)))
            .route("/p", post(async || "posted"));
        wrap(routes, allow_cors)
    }

    async fn ask(app: Router, request: http::request::Builder) -> (Response<()>, String) {
        let response = app
            .oneshot(request.body(Body::empty()).unwrap())
            .await
            .unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        (
            Response::from_parts(parts, ()),
            String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    #[tokio::test]
    async fn slashes_collapse_without_a_redirect_and_keep_the_query() {
        for path in ["/a/b", "//a/b", "///a////b"] {
            let (head, text) =
                ask(app(false), Request::builder().uri(format!("{path}?q=//x"))).await;
            assert_eq!(
                (head.status(), text.as_str()),
                (StatusCode::OK, "/a/b?q=//x")
            );
        }
        let (head, text) = ask(app(false), Request::builder().method("POST").uri("//p")).await;
        assert_eq!((head.status(), text.as_str()), (StatusCode::OK, "posted"));
    }

    #[tokio::test]
    async fn unknown_paths_and_methods_are_answered() {
        for path in [
            "/",
            "/a",
            "/a/b/",
            "/a/../a/b",
            "/a%2Fb",
            "/%2e%2e/etc/passwd",
            "/a/b\\..",
            "*",
        ] {
            let (head, text) = ask(app(false), Request::builder().uri(path)).await;
            assert_eq!(
                (head.status(), text.trim()),
                (StatusCode::NOT_FOUND, "404 page not found")
            );
        }
        for method in ["POST", "PATCH", "BREW", "TRACE", "OPTIONS", "CONNECT"] {
            let (head, text) = ask(app(false), Request::builder().method(method).uri("/a/b")).await;
            assert_eq!(head.status(), StatusCode::METHOD_NOT_ALLOWED, "{method}");
            assert!(text.starts_with(r#"{"status":"FAIL","message":"#), "{text}");
        }
        let (head, text) = ask(app(false), Request::builder().method("HEAD").uri("/a/b")).await;
        assert_eq!((head.status(), text.as_str()), (StatusCode::OK, ""));
    }

    #[tokio::test]
    async fn gzip_when_accepted_and_worth_it() {
        let (head, _) = ask(app(false), Request::builder().uri("/big")).await;
        assert!(!head.headers().contains_key("content-encoding"));
        let accept = |path| {
            Request::builder()
                .uri(path)
                .header("accept-encoding", "gzip, br")
        };
        let (head, text) = ask(app(false), accept("/big")).await;
        assert_eq!(head.headers()["content-encoding"], "gzip");
        assert!(text.len() < 1000);
        let (head, _) = ask(app(false), accept("/a/b")).await;
        assert!(!head.headers().contains_key("content-encoding"));
    }

    #[tokio::test]
    async fn cross_origin_answers_only_when_switched_on() {
        let allow = "access-control-allow-origin";
        for (on, path) in [(false, "/a/b"), (true, "/a/b"), (true, "/nowhere")] {
            let (head, _) = ask(app(on), Request::builder().uri(path)).await;
            assert_eq!(head.headers().contains_key(allow), on);
        }
        let preflight = Request::builder()
            .method("OPTIONS")
            .uri("/p")
            .header("access-control-request-method", "POST");
        let (head, _) = ask(app(true), preflight).await;
        assert_eq!(head.status(), StatusCode::OK);
        assert_eq!(head.headers()[allow], "*");
    }
}
