//! Pulling: equal bytes whatever was there before and whoever lies.

use super::*;
use axum::body::Body;
use mainstay_agent::transfer::WireRecord;
use mainstay_agent::transfer::api::CHUNKS_GET;
use std::os::unix::fs::MetadataExt;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pulled_file_is_equal_and_as_sparse() {
    let cluster = Cluster::new(3);
    let members = cluster.serve_all().await;
    let (image, copy) = (cluster.file("image"), cluster.file("copy"));
    write_image(&image, 1);
    let published = push(
        &[&members[0].url],
        &image,
        &spec("t", "v1", Durability::All),
    )
    .await
    .unwrap();
    assert!(published.tag.visible);
    assert_eq!(published.tag.holders.len(), 3);
    let urls: Vec<&str> = members.iter().map(|m| m.url.as_str()).collect();
    pull(&urls, &published.tag.manifest, &copy).await.unwrap();
    assert_same(&image, &copy);
    let blocks = |path: &Path| std::fs::metadata(path).unwrap().blocks();
    assert!(
        blocks(&copy) <= blocks(&image) + 512,
        "{} of {}",
        blocks(&copy),
        blocks(&image)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_already_there_is_kept_and_the_rest_repaired() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, false).await;
    let (image, copy) = (cluster.file("image"), cluster.file("copy"));
    write_image(&image, 8);
    let published = push(&[&member.url], &image, &spec("t", "v1", Durability::One))
        .await
        .unwrap();
    // Longer than it should be, wrong in three chunks, not zero where it should be.
    std::fs::copy(&image, &copy).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&copy).unwrap();
    file.set_len(300 << 20).unwrap();
    for at in [0, 5 << 20, 151 << 20, 100 << 20, (60 << 20) + 5] {
        file.write_all_at(b"wrong", at).unwrap();
    }
    let proxy = Proxy::new(&member.url, Vec::new()).await;
    pull(&[&proxy.url], &published.tag.manifest, &copy)
        .await
        .unwrap();
    assert_same(&image, &copy);
    let fetched = proxy.sent_back.load(Ordering::Relaxed);
    assert!(
        fetched < 1 << 20,
        "{fetched} bytes for three chunks and the names"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_pull_goes_on_where_it_was() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, false).await;
    let (image, copy) = (cluster.file("image"), cluster.file("copy"));
    write_image(&image, 4);
    let published = push(&[&member.url], &image, &spec("t", "v1", Durability::One))
        .await
        .unwrap();
    let whole = Proxy::new(&member.url, Vec::new()).await;
    let (url, manifest, dest) = (
        whole.url.clone(),
        published.tag.manifest.clone(),
        copy.clone(),
    );
    let reached = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&reached);
    let killed = tokio::spawn(async move {
        let progress = move |done: u64, _: u64| {
            seen.fetch_max(done, Ordering::Relaxed);
        };
        pull_file(&client(), &[url], &manifest, 0, &dest, &progress)
            .await
            .map(|_| ())
    });
    let half = (200 << 20) - (12 << 20);
    eventually("half of it pulled", || {
        reached.load(Ordering::Relaxed) >= half
    })
    .await;
    killed.abort();
    let kept = reached.load(Ordering::Relaxed) - ((200 << 20) - (25 << 20));
    let rest = Proxy::new(&member.url, Vec::new()).await;
    pull(&[&rest.url], &published.tag.manifest, &copy)
        .await
        .unwrap();
    assert_same(&image, &copy);
    let fetched = rest.sent_back.load(Ordering::Relaxed);
    assert!(
        fetched < (25 << 20) - kept / 2,
        "fetched {fetched} although {kept} was there"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn liars_and_the_dead_among_the_registries_do_no_harm() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, false).await;
    let (image, copy) = (cluster.file("image"), cluster.file("copy"));
    std::fs::write(&image, noise(9, 3 << 20)).unwrap();
    let published = push(&[&member.url], &image, &spec("t", "v1", Durability::One))
        .await
        .unwrap();

    // Answers every question with the right names and wrong bytes.
    let lie = |body: axum::body::Bytes| async move {
        let records: Vec<WireRecord> = body
            .chunks_exact(32)
            .map(|id| WireRecord {
                id: id.try_into().unwrap(),
                ..WireRecord::encode(&noise(1, 65536))
            })
            .collect();
        Body::from(WireRecord::frame_all(&records))
    };
    let liar = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let liar_url = format!("http://{}", liar.local_addr().unwrap());
    let router = Router::new().route(CHUNKS_GET, post(lie));
    let task = tokio::spawn(async move { axum::serve(liar, router).await.unwrap() });
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dead_url = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);

    pull(
        &[&liar_url, &dead_url, &member.url],
        &published.tag.manifest,
        &copy,
    )
    .await
    .unwrap();
    assert_same(&image, &copy);
    let told = pull(&[&liar_url, &dead_url], &published.tag.manifest, &copy)
        .await
        .unwrap_err();
    assert!(
        matches!(&told, TransferError::Unavailable(t) if t.contains(&dead_url)),
        "{told}"
    );
    task.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_without_the_bytes_serves_them_all_the_same() {
    let cluster = Cluster::new(2);
    let holder = cluster.serve(1, false).await;
    let empty = cluster.serve(2, false).await;
    let (image, copy) = (cluster.file("image"), cluster.file("copy"));
    write_image(&image, 6);
    let published = push(&[&holder.url], &image, &spec("t", "v1", Durability::One))
        .await
        .unwrap();
    pull(&[&empty.url], &published.tag.manifest, &copy)
        .await
        .unwrap();
    assert_same(&image, &copy);
    let kept = empty.service.chunks().stats().chunks;
    assert_eq!(
        kept,
        holder.service.chunks().stats().chunks,
        "what was fetched is kept"
    );
}

#[tokio::test]
async fn an_empty_file_and_odd_lengths() {
    let cluster = Cluster::new(1);
    let member = cluster.serve(1, false).await;
    for (tag, len) in [0, 1, 65535, 65536, 65537].into_iter().enumerate() {
        let (image, copy) = (cluster.file("image"), cluster.file("copy"));
        std::fs::write(&image, noise(tag as u64, len)).unwrap();
        let spec = spec("t", &tag.to_string(), Durability::One);
        let published = push(&[&member.url], &image, &spec).await.unwrap();
        pull(&[&member.url], &published.tag.manifest, &copy)
            .await
            .unwrap();
        assert_same(&image, &copy);
    }
}
