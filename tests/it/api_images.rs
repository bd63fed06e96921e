//! The wire contract, saves: from the request to the record of it two hours later, requests that come twice and
//! at two members, and what is refused.

use crate::cluster::Cluster;
use axum::body::Body;
use http::Request;
use mainstay_model::command::Command;
use mainstay_model::ids::Digest;
use mainstay_model::instance::ScriptResult;
use mainstay_model::save::{SaveSaid, SavedDisk};
use mainstay_model::{MemberId, Outcome};
use serde_json::{Value, json};

/// Three members, a template `debian` (`t1`), and so many started instances.
async fn cloud(instances: usize) -> (Cluster, Vec<String>) {
    let cluster = Cluster::start(3).await;
    cluster.raise_features().await;
    cluster.template(&["v1"]).await;
    let ids = cluster.started(instances).await;
    (cluster, ids)
}

/// Visible at once.
async fn publish(cluster: &Cluster, save: &str) -> Outcome {
    let disk = SavedDisk {
        save: save.into(),
        template: "debian".to_owned(),
        manifest: Digest([77; 32]),
        size: 5_000,
        disk: "disk.qcow2".to_owned(),
        format: "qcow2".to_owned(),
        holder: MemberId(2),
        copies_needed: 1,
        voters: [MemberId(2)].into(),
    };
    let disk = Box::new(disk);
    let command = Command::PublishSaved { disk };
    cluster.members[2].app.submit(command).await.unwrap()
}

/// On every member: a read sees what was answered on another.
async fn shown(cluster: &Cluster, id: &str) -> Value {
    let path = format!("/api/v1/image?id={id}");
    let mut shown = Vec::new();
    for n in 0..3 {
        let mut seen = cluster.get(n, &path).await.body();
        // Each names its own.
        seen["request"]["RegistryAddr"] = json!("http://c1:8089");
        shown.push(seen);
    }
    assert!(shown.iter().all(|seen| *seen == shown[0]), "{shown:?}");
    shown.remove(0)
}

async fn state(cluster: &Cluster, id: &str) -> String {
    let shown = cluster.get(0, &format!("/api/v1/vm?id={id}")).await.body();
    shown["instance_state"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn an_instance_becomes_a_tag_and_the_request_is_remembered() {
    let (cluster, ids) = cloud(1).await;
    assert_eq!(cluster.get(0, "/api/v1/image").await.body(), json!([]));
    // As the Jenkins plugin sends it, with members that are null.
    let ask = json!({
        "id": ids[0], "target_vm_id": "t1", "tag": "v2", "description": "nightly", "suspend": null,
        "script": "c3luYyAmJiBzbGVlcCA2MA==", "revert_before_push": false, "revert_tag": null,
        "do_suspend_sanity_test": true,
    });
    let asked = cluster.call(1, "POST", "/api/v1/image", ask.clone()).await;
    let asked = asked.body();
    let id = asked["request_id"].as_str().unwrap().to_owned();
    assert_eq!(state(&cluster, &ids[0]).await, "Pushing");
    // The answer was lost and the client asks another member: the same request.
    let again = cluster.call(2, "POST", "/api/v1/image", ask).await.body();
    assert_eq!(again, asked);
    let pending = shown(&cluster, &id).await;
    let since = pending["request"]["Timestamp"].as_u64().unwrap();
    assert!(since > 1_600_000_000, "{since}");
    let request = json!({
        "RequestId": id, "Priority": 1000, "Timestamp": since, "ReserveExpiryTimestamp": 0,
        "RegistryAddr": "http://c1:8089", "VMID": ids[0], "InstanceID": ids[0], "NodeID": "n2", "TemplateID": "t1",
        "NewTemplateName": "", "Tag": "v2", "Description": "nightly", "Suspend": true,
        "Script": "c3luYyAmJiBzbGVlcCA2MA==", "DoSuspendTest": true, "RevertBeforePush": false, "RevertTag": "",
        "CancelOnScriptFailure": false,
    });
    let mut expected = json!({
        "id": id, "status": "pending", "request": request, "error": null, "script_result": null,
    });
    let from_first = cluster.get(0, &format!("/api/v1/image?id={id}")).await;
    assert_eq!(from_first.body(), expected);
    let ended = ScriptResult {
        return_code: 3,
        did_timeout: false,
        stdout: "packed\n".to_owned(),
        stderr: String::new(),
    };
    cluster.report_save(&id, SaveSaid::Begun, Some(ended)).await;
    publish(&cluster, &id).await;
    cluster.report_save(&id, SaveSaid::Pushed, None).await;
    expected["status"] = json!("done");
    expected["request"]["Script"] = json!("");
    expected["script_result"] = json!({
        "return_code": 3, "errors": [], "did_timeout": false, "stdout": "packed\n", "stderr": "",
    });
    let list = cluster.get(0, "/api/v1/image").await.body();
    assert_eq!(list, json!([expected]));
    assert_eq!(state(&cluster, &ids[0]).await, "Terminating");
    let template = cluster.get(1, "/api/v1/registry/vm?id=t1").await.body();
    let tag = &template["versions"][1];
    assert_eq!(
        (
            &tag["tag"],
            &tag["number"],
            &tag["description"],
            &tag["arch"]
        ),
        (&json!("v2"), &json!(1), &json!("nightly"), &json!("amd64"))
    );
    cluster.stop().await;
}

#[tokio::test]
async fn a_save_that_fails_says_why_and_the_instance_runs_on() {
    let (cluster, ids) = cloud(2).await;
    let ask = |n: usize| {
        json!({"id": ids[n], "new_template_name": "mine", "tag": "v1", "suspend": "false",
               "cancel_on_script_failure": true, "script": "ZXhpdCA3"})
    };
    let first = cluster
        .call(0, "POST", "/api/v1/image", ask(0))
        .await
        .body();
    let second = cluster
        .call(0, "POST", "/api/v1/image", ask(1))
        .await
        .body();
    let id = |body: &Value| body["request_id"].as_str().unwrap().to_owned();
    let failed = |stopped| SaveSaid::Failed {
        why: "script exit code 7".to_owned(),
        stopped,
    };
    cluster
        .report_save(&id(&first), SaveSaid::Begun, None)
        .await;
    cluster.report_save(&id(&first), failed(false), None).await;
    let shown = shown(&cluster, &id(&first)).await;
    assert_eq!(shown["status"], "error");
    assert_eq!(shown["error"], json!({"Message": "script exit code 7"}));
    assert_eq!(shown["request"]["Suspend"], false);
    assert_eq!(shown["request"]["NewTemplateName"], "mine");
    assert_eq!(state(&cluster, &ids[0]).await, "Started");
    cluster
        .report_save(&id(&second), SaveSaid::Begun, None)
        .await;
    cluster.report_save(&id(&second), failed(true), None).await;
    assert_eq!(
        state(&cluster, &ids[1]).await,
        "Stopping",
        "on its way back"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn one_idempotency_key_is_one_save() {
    let (cluster, ids) = cloud(1).await;
    let ask = |n: usize, key: &str, body: Value| {
        let request = Request::post("/api/v1/image").header("idempotency-key", key);
        cluster.send(n, request.body(Body::from(body.to_string())).unwrap())
    };
    let body = json!({"id": ids[0], "new_template_name": "mine", "tag": "v1"});
    let first = ask(0, "a", body.clone()).await.body();
    assert_eq!(ask(1, "a", body.clone()).await.body(), first);
    let id = first["request_id"].as_str().unwrap();
    cluster.report_save(id, SaveSaid::Begun, None).await;
    publish(&cluster, id).await;
    cluster.report_save(id, SaveSaid::Pushed, None).await;
    // The last retry comes when it has ended.
    assert_eq!(ask(2, "a", body.clone()).await.body(), first);
    let list = cluster.get(0, "/api/v1/image").await.body();
    assert_eq!(list.as_array().unwrap().len(), 1);
    assert_eq!(list[0]["status"], "done");
    let template = list[0]["request"]["TemplateID"].as_str().unwrap();
    let path = format!("/api/v1/registry/vm?id={template}");
    assert_eq!(cluster.get(0, &path).await.body()["name"], "mine");
    let (status, why) = ask(0, "b", body).await.refusal();
    assert_eq!(status, 200);
    assert!(why.contains("Terminating"), "{why}");
    cluster.stop().await;
}

#[tokio::test]
async fn saves_that_are_refused() {
    let (cluster, ids) = cloud(2).await;
    let id = ids[0].as_str();
    let waiting = cluster
        .call(0, "POST", "/api/v1/vm", json!({"vmid": "t1"}))
        .await
        .body();
    let both = "only one of target_vm_id and new_template_name can be given";
    let cases = [
        (
            json!({"tag": "v2", "target_vm_id": "t1"}),
            400,
            "id is required",
        ),
        (
            json!({"id": id, "target_vm_id": "t1"}),
            400,
            "tag is required",
        ),
        (
            json!({"id": id, "tag": "v2"}),
            400,
            "target_vm_id or new_template_name is required",
        ),
        (
            json!({"id": id, "tag": "v2", "target_vm_id": "t1", "new_template_name": "n"}),
            400,
            both,
        ),
        (
            json!({"id": id, "tag": "v2", "target_vm_id": 1}),
            400,
            "target_vm_id must be a string",
        ),
        (
            json!({"id": id, "tag": "v2", "target_vm_id": "t1", "suspend": "yes"}),
            400,
            "suspend must be true or false",
        ),
        (
            json!({"id": id, "tag": "v2", "new_template_name": "n", "revert_before_push": true}),
            400,
            "revert_before_push needs target_vm_id: a new template has nothing to revert",
        ),
        (
            json!({"id": "nope", "tag": "v2", "target_vm_id": "t1"}),
            200,
            "Not found",
        ),
        (
            json!({"id": id, "tag": "v2", "target_vm_id": "t9"}),
            200,
            "VM not in the registry",
        ),
        (
            json!({"id": id, "tag": "v1", "target_vm_id": "t1"}),
            200,
            "Tag v1 already exists",
        ),
        (
            json!({"id": id, "tag": "v2", "target_vm_id": "t1", "revert_before_push": true, "revert_tag": "v9"}),
            200,
            "No such tag v9",
        ),
        (
            json!({"id": id, "tag": "v2", "new_template_name": "debian"}),
            200,
            "a template named debian exists: save into it, or choose another name",
        ),
        (
            json!({"id": waiting[0], "tag": "v2", "target_vm_id": "t1"}),
            200,
            "the instance is Scheduling: only one that is Started can be saved",
        ),
        (
            json!({"id": id, "tag": "v2", "target_vm_id": "t1", "script": "?"}),
            200,
            "script is not valid base64: Invalid symbol 63, offset 0.",
        ),
    ];
    for (body, status, text) in cases {
        let answer = cluster.call(1, "POST", "/api/v1/image", body.clone()).await;
        assert_eq!(answer.refusal(), (status, text.to_owned()), "{body}");
    }
    let bad_name = json!({"id": id, "tag": "a/b", "target_vm_id": "t1"});
    let refused = cluster.call(0, "POST", "/api/v1/image", bad_name).await;
    let (status, why) = refused.refusal();
    assert!(
        status == 400 && why.starts_with("tag \"a/b\" is refused"),
        "{why}"
    );
    assert_eq!(cluster.get(0, "/api/v1/image").await.body(), json!([]));
    assert_eq!(state(&cluster, id).await, "Started");
    // With plus and colon, as clients name tags; a second, other request for the same instance is refused.
    let ask = json!({"id": id, "tag": "v1+git:77", "target_vm_id": "t1"});
    let asked = cluster.call(0, "POST", "/api/v1/image", ask).await.body();
    let other = json!({"id": id, "tag": "v3", "target_vm_id": "t1"});
    let (_, why) = cluster
        .call(2, "POST", "/api/v1/image", other)
        .await
        .refusal();
    let request = asked["request_id"].as_str().unwrap();
    assert_eq!(
        why,
        format!("the instance is being saved already, by request {request}")
    );
    let restart = json!({"instance_id": id});
    let refused = cluster
        .call(0, "POST", "/api/v1/rpc/vm/restart", restart)
        .await;
    assert!(refused.refusal().1.contains("Pushing"));
    // The end wins; the request says what became of it.
    cluster
        .call(1, "DELETE", "/api/v1/vm", json!({"id": id}))
        .await
        .body();
    let ended = shown(&cluster, request).await;
    assert_eq!(ended["error"]["Message"], "the instance was terminated");
    cluster.stop().await;
}

/// Nothing is begun before every member knows what that is.
#[tokio::test]
async fn a_cluster_of_an_older_level_saves_nothing() {
    let cluster = Cluster::start(1).await;
    cluster.template(&["v1"]).await;
    let ask = json!({"id": "i", "tag": "v2", "target_vm_id": "t1"});
    let (status, why) = cluster
        .call(0, "POST", "/api/v1/image", ask)
        .await
        .refusal();
    assert_eq!(status, 200);
    assert!(
        why.starts_with("not yet: this needs feature level"),
        "{why}"
    );
    cluster.stop().await;
}
