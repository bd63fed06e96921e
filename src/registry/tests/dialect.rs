//! The registry's REST dialect, as third parties use it.

use super::*;
use serde_json::{Value, json};

async fn call(method: &str, url: &str, body: Option<Vec<u8>>) -> (u16, Value) {
    let mut request = client().request(method.parse().unwrap(), url);
    if let Some(body) = body {
        request = request
            .header("content-type", "application/x-www-form-urlencoded")
            .body(body);
    }
    let answer = request.send().await.unwrap();
    let status = answer.status().as_u16();
    let text = answer.text().await.unwrap();
    (
        status,
        serde_json::from_str(&text).unwrap_or(Value::String(text)),
    )
}

#[tokio::test]
async fn the_dialect_answers_as_the_contract_says() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, false).await;
    let url = |path: &str| format!("{}{path}", member.url);
    assert_eq!(call("GET", &url("/livez"), None).await.0, 200);
    assert_eq!(call("GET", &url("/readyz"), None).await.0, 200);
    let (_, status) = call("GET", &url("//registry/status"), None).await;
    assert_eq!(
        status["body"],
        json!({"status": "Running", "version": "1.0-test"})
    );
    assert_eq!(call("GET", &url("/"), None).await.1, status);
    for path in ["/registry/vm", "//registry//v2/vm"] {
        let (code, list) = call("GET", &url(path), None).await;
        assert_eq!(
            (code, list),
            (200, json!({"status": "OK", "body": [], "message": ""}))
        );
    }
    let (_, disk) = call("GET", &url("/registry/disk"), None).await;
    assert!(disk["body"]["free"].is_u64() && disk["body"]["total"].is_u64());
    let (code, text) = call("GET", &url("/nothing"), None).await;
    assert_eq!((code, text), (404, json!("404 page not found\n")));

    let image = cluster.file("image");
    std::fs::write(&image, noise(1, 100_000)).unwrap();
    let mut ids = Vec::new();
    for tag in ["v1", "v2+x", "v3", "v4"] {
        let spec = spec("ci", tag, Durability::One);
        ids.push(
            push(&[&member.url], &image, &spec)
                .await
                .unwrap()
                .tag
                .template_id,
        );
    }
    let id = ids[0].clone();
    let (_, v1) = call("GET", &url("/registry/vm"), None).await;
    assert_eq!(v1["body"], json!([{ id.as_str(): "ci" }]));
    let (_, v2) = call("GET", &url("/registry/v2/vm"), None).await;
    assert_eq!(v2["body"][0]["id"], json!(id));
    assert_eq!(v2["body"][0]["name"], json!("ci"));
    let by_id = url(&format!("/registry/v2/vm?id={id}"));
    let tags = async || -> Vec<String> {
        let (_, one) = call("GET", &by_id, None).await;
        let versions = one["body"]["versions"].as_array().unwrap().clone();
        versions
            .iter()
            .map(|v| v["tag"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(tags().await, ["v1", "v2+x", "v3", "v4"]);

    // Revert: no selector, a number as text in a body that is not UTF-8, a tag with '+' in a query.
    let revert = url(&format!("/registry/revert?id={id}"));
    let (code, done) = call("DELETE", &revert, None).await;
    assert_eq!(
        (code, done),
        (200, json!({"status": "OK", "body": null, "message": ""}))
    );
    assert_eq!(tags().await, ["v1", "v2+x", "v3"]);
    let (code, answer) = call("DELETE", &format!("{revert}&tag=v9"), None).await;
    assert_eq!(
        (code, answer["message"].clone()),
        (400, json!("No such tag v9"))
    );
    let body = b"{\"number\":\"2\",\"note\":\"caf\xe9\",\"tag\":null}".to_vec();
    assert_eq!(call("DELETE", &revert, Some(body)).await.0, 200);
    assert_eq!(tags().await, ["v1", "v2+x"]);
    assert_eq!(
        call("DELETE", &format!("{revert}&tag=v2%2Bx"), None)
            .await
            .0,
        200
    );
    assert_eq!(tags().await, ["v1"]);

    for body in ["{", "[1]", "7"] {
        assert_eq!(call("DELETE", &revert, Some(body.into())).await.0, 400);
    }
    assert_eq!(call("DELETE", &url("/registry/vm"), None).await.0, 400);
    let delete = url(&format!("/registry/vm?id={id}"));
    assert_eq!(call("DELETE", &delete, None).await.0, 200);
    for (method, path) in [("DELETE", &delete), ("GET", &delete), ("GET", &by_id)] {
        let (code, answer) = call(method, path, None).await;
        assert_eq!(
            (code, &answer["status"], &answer["message"]),
            (200, &json!("FAIL"), &json!("Not found"))
        );
    }
}

/// Lines of other programs: any member takes them, in whatever form `curl -d` gives them.
#[tokio::test]
async fn the_central_log_takes_lines_and_shows_them() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, false).await;
    let url = format!("{}/log", member.url);
    let (code, none) = call("GET", &url, None).await;
    assert_eq!((code, &none["body"]), (200, &json!([])));
    let line = |service: &str, content: &str| {
        let line =
            json!({"machine_name": "m1", "service": service, "host": "h", "content": content});
        Some(line.to_string().into_bytes())
    };
    for content in ["one", "two\nlines\u{1b}[0m", ""] {
        let (code, done) = call("POST", &url, line("Join Service", content)).await;
        assert_eq!((code, done["status"].clone()), (200, json!("OK")));
    }
    let (_, kept) = call("GET", &url, None).await;
    assert_eq!(kept["body"][0]["service"], "Join Service");
    assert!(kept["body"][0]["bytes"].is_u64() && kept["body"][0]["last_write"].is_u64());
    let (_, text) = call("GET", &format!("{url}?service=Join%20Service"), None).await;
    let text = text.as_str().unwrap();
    let ends: Vec<&str> = text.lines().map(|l| l.split_once(' ').unwrap().1).collect();
    assert_eq!(
        ends,
        ["[m1] [h] one", r"[m1] [h] two\nlines\u{1b}[0m", "[m1] [h] "]
    );
    let (_, end) = call("GET", &format!("{url}?service=Join+Service&bytes=40"), None).await;
    assert!(end.as_str().unwrap().lines().count() == 1, "{end}");
    let (code, unknown) = call("GET", &format!("{url}?service=x"), None).await;
    assert_eq!((code, &unknown["message"]), (200, &json!("Not found")));

    let long = "x".repeat(70_000);
    let wrong = [
        (line("", "x"), 400, "service is missing"),
        (
            line(&long[..81], "x"),
            400,
            "service is longer than 80 bytes",
        ),
        (line("s", &long), 400, "content is longer than 65536 bytes"),
        (Some(b"service=s".to_vec()), 400, "the body is not JSON"),
        (None, 400, "service is missing"),
    ];
    for (body, status, message) in wrong {
        let (code, answer) = call("POST", &url, body).await;
        assert_eq!(code, status);
        let said = answer["message"].as_str().unwrap();
        assert!(said.starts_with(message), "{said}");
    }
    cluster.shared.full.lock().insert(1);
    let (code, full) = call("POST", &url, line("s", "x")).await;
    assert_eq!((code, &full["message"]), (507, &json!("no room")));
    let (_, kept) = call("GET", &url, None).await;
    assert_eq!(
        kept["body"].as_array().unwrap().len(),
        1,
        "nothing of these was kept"
    );
}
