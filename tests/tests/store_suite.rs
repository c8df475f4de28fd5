//! One behaviour suite for every kind of store.

use std::io::Write;

use bytes::Bytes;
use farm_core::store::artifact::{ArtifactStore, Create, StoreError};
use farm_tests::s3::S3Server;
use futures::TryStreamExt;

/// Every rule, on a store that may already hold other objects.
async fn behaves(store: &ArtifactStore) {
    store.probe().await.unwrap();
    what_is_put_is_got_and_replaced(store).await;
    a_missing_object_is_told_from_a_broken_store(store).await;
    an_object_over_the_limit_is_refused_unread(store).await;
    exactly_one_of_many_creates_wins(store).await;
    a_file_of_several_parts_arrives_whole(store).await;
    a_folders_keys_are_listed_up_to_a_limit(store).await;
    a_deleted_object_is_gone_and_may_be_deleted_again(store).await;
}

async fn what_is_put_is_got_and_replaced(store: &ArtifactStore) {
    for value in ["first", "", "third"] {
        store.put("jobs/a/notes.txt", Bytes::from(value)).await.unwrap();
        assert_eq!(store.get("jobs/a/notes.txt", 5).await.unwrap(), value);
        assert_eq!(store.head("jobs/a/notes.txt").await.unwrap(), Some(value.len() as u64));
    }
}

async fn a_missing_object_is_told_from_a_broken_store(store: &ArtifactStore) {
    assert_eq!(store.head("jobs/none").await.unwrap(), None);
    let error = store.get("jobs/none", 10).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
    let message = error.to_string();
    assert!(message.contains("jobs/none") && message.contains(store.url()), "{message}");
    assert!(matches!(store.get_stream("jobs/none").await.err(), Some(StoreError::NotFound { .. })));
}

async fn an_object_over_the_limit_is_refused_unread(store: &ArtifactStore) {
    store.put("jobs/a/big", Bytes::from(vec![7; 1001])).await.unwrap();
    assert_eq!(store.get("jobs/a/big", 1001).await.unwrap().len(), 1001);
    let error = store.get("jobs/a/big", 1000).await.unwrap_err();
    assert!(matches!(error, StoreError::TooLarge { bytes: 1001, limit: 1000, .. }), "{error}");
}

async fn exactly_one_of_many_creates_wins(store: &ArtifactStore) {
    for round in 0..4 {
        let key = format!("jobs/{round}/result.json");
        let attempts = (0..8).map(|n| {
            let (store, key) = (store.clone(), key.clone());
            // Bodies of different lengths, so that a mixture would show.
            tokio::spawn(async move { store.create(&key, Bytes::from(format!("{n}").repeat(100 + n))).await.unwrap() })
        });
        let mut winners = Vec::new();
        for (n, ended) in futures::future::join_all(attempts).await.into_iter().enumerate() {
            if ended.unwrap() == Create::Created {
                winners.push(n);
            }
        }
        let [winner] = winners[..] else { panic!("{} winners in {}", winners.len(), store.url()) };
        assert_eq!(store.get(&key, 1000).await.unwrap(), format!("{winner}").repeat(100 + winner));
        assert_eq!(store.create(&key, Bytes::from("late")).await.unwrap(), Create::AlreadyExists);
        assert_eq!(store.get(&key, 1000).await.unwrap(), format!("{winner}").repeat(100 + winner));
    }
}

async fn a_file_of_several_parts_arrives_whole(store: &ArtifactStore) {
    let dir = tempfile::tempdir().unwrap();
    // Prime, so that no part looks like another.
    let pattern: Vec<u8> = (0..4099_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    // Around the part size: one request, exactly one part, two and a bit.
    for bytes in [0, 1, (8 << 20) - 1, 8 << 20, (16 << 20) + 5] {
        let mut content = pattern.repeat(bytes / pattern.len() + 1);
        content.truncate(bytes);
        let path = dir.path().join("clip.mp4");
        std::fs::File::create(&path).unwrap().write_all(&content).unwrap();
        store.put_file("jobs/b/attempt/1/clip.mp4", &path).await.unwrap();

        let (length, stream) = store.get_stream("jobs/b/attempt/1/clip.mp4").await.unwrap();
        assert_eq!(length, bytes as u64);
        let chunks: Vec<Bytes> = stream.try_collect().await.unwrap();
        assert!(chunks.concat() == content, "{bytes} bytes came back changed");
    }
    let error = store.put_file("jobs/b/x", &dir.path().join("absent")).await.unwrap_err().to_string();
    assert!(error.contains("jobs/b/x") && error.contains("absent"), "{error}");
    assert_eq!(store.head("jobs/b/x").await.unwrap(), None);
}

async fn a_folders_keys_are_listed_up_to_a_limit(store: &ArtifactStore) {
    let folder = "jobs/listed/latent";
    assert_eq!(store.list(folder, 10).await.unwrap(), Vec::<String>::new());
    let mut keys = ["1", "2", "deep/er"].map(|name| format!("{folder}/{name}")).to_vec();
    for key in keys.iter().chain(&["jobs/listed/latent-2/1".to_owned(), "jobs/listed/other".to_owned()]) {
        store.put(key, Bytes::from("x")).await.unwrap();
    }
    let mut listed = store.list(folder, 10).await.unwrap();
    listed.sort();
    keys.sort();
    assert_eq!(listed, keys);
    assert_eq!(store.list(folder, 2).await.unwrap().len(), 2);
}

async fn a_deleted_object_is_gone_and_may_be_deleted_again(store: &ArtifactStore) {
    store.put("jobs/c/x", Bytes::from("x")).await.unwrap();
    store.delete("jobs/c/x").await.unwrap();
    store.delete("jobs/c/x").await.unwrap();
    assert_eq!(store.head("jobs/c/x").await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory() {
    behaves(&ArtifactStore::open("memory:").unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn file() {
    let dir = tempfile::tempdir().unwrap();
    let store = ArtifactStore::open(dir.path().join("made/here").to_str().unwrap()).unwrap();
    behaves(&store).await;
    // Another process sees the same objects under the same names.
    assert!(dir.path().join("made/here/jobs/b/attempt/1/clip.mp4").is_file());
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_with_and_without_prefix() {
    let server = S3Server::start(&["clips"]).unwrap();
    let open = |url| ArtifactStore::open_with(url, server.environment()).unwrap();
    behaves(&open("s3://clips/some/prefix")).await;
    behaves(&open("s3://clips")).await;
    // The prefix is a part of the key, nothing else.
    let key = "jobs/b/attempt/1/clip.mp4";
    assert_eq!(
        open("s3://clips").head(&format!("some/prefix/{key}")).await.unwrap(),
        open("s3://clips/some/prefix").head(key).await.unwrap()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_is_told_by_the_probe_with_a_hint() {
    let server = S3Server::start(&["clips"]).unwrap();
    let wrong = |(name, value): (String, String)| {
        let wrong = name == "AWS_SECRET_ACCESS_KEY";
        (name, if wrong { "wrong".into() } else { value })
    };
    let store = ArtifactStore::open_with("s3://clips/x", server.environment().into_iter().map(wrong)).unwrap();
    let error = store.probe().await.unwrap_err().to_string();
    assert!(error.contains("s3://clips/x") && error.contains("hint: the bucket has to exist"), "{error}");
}
