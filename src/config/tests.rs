//! Mistakes in the configuration are sentences, and flags win over the file.

use super::*;

fn args(list: &str) -> ServerArgs {
    ServerArgs {
        name: Some("c1".to_owned()),
        data_dir: Some("/d".into()),
        initial_cluster: Some(list.to_owned()),
        ..ServerArgs::default()
    }
}

#[test]
fn addresses_come_from_the_own_entry() {
    let config = args("c2=http://10.0.0.2:9000,c1=http://10.0.0.1:9001/")
        .resolve()
        .unwrap();
    assert_eq!(config.peer_listen.to_string(), "0.0.0.0:9001");
    assert_eq!(
        config.list[0],
        Entry {
            name: "c1".into(),
            url: "http://10.0.0.1:9001".into()
        }
    );
    let member = config.member(8090, 8089);
    assert_eq!(member.api_url, "http://10.0.0.1:8090");
    assert_eq!(member.registry_url, "http://10.0.0.1:8089");
    let mut other = args("c1=http://10.0.0.1");
    other.advertise_host = Some("cloud.example".into());
    let config = other.resolve().unwrap();
    assert_eq!(config.own().url, "http://10.0.0.1:8091");
    assert_eq!(config.member(1, 2).api_url, "http://cloud.example:1");
}

#[test]
fn a_member_without_a_list_is_alone() {
    let mut one = args("");
    one.initial_cluster = None;
    one.peer_listen = Some("127.0.0.1:7000".into());
    let config = one.clone().resolve().unwrap();
    assert_eq!(config.own().url, "http://127.0.0.1:7000");
    // It may grow later: what it tells others must reach it.
    one.peer_listen = None;
    assert_eq!(
        one.clone().resolve().unwrap().own().url,
        "http://127.0.0.1:8091"
    );
    one.advertise_host = Some("c1.example".into());
    assert_eq!(one.resolve().unwrap().own().url, "http://c1.example:8091");
}

#[test]
fn one_that_joins_names_members_and_says_where_it_is() {
    let join = |urls: &str| ServerArgs {
        join: Some(urls.to_owned()),
        initial_cluster: None,
        ..args("")
    };
    let said = |args: ServerArgs| args.resolve().unwrap_err().0;
    assert!(said(join("http://h:8091")).contains("--advertise-host"));
    let placed = |urls: &str| ServerArgs {
        advertise_host: Some("10.0.0.9".into()),
        ..join(urls)
    };
    let config = placed("http://a:8091, http://b/,http://a:8091")
        .resolve()
        .unwrap();
    assert_eq!(config.join, ["http://a:8091", "http://b:8091"]);
    assert_eq!(config.own().url, "http://10.0.0.9:8091");
    assert!(!config.learner);
    assert!(said(placed(",")).contains("--join is empty"));
    assert!(said(placed("c1=http://a:1")).contains("--join"));
    let both = ServerArgs {
        initial_cluster: Some("c1=http://h:1".into()),
        ..placed("http://a:1")
    };
    assert!(said(both).contains("not both"));
    let silent = ServerArgs {
        learner: Some(true),
        ..args("c1=http://h:1")
    };
    assert!(said(silent).contains("--learner goes with --join"));
}

#[test]
fn mistakes_are_sentences() {
    let text = |list: &str| args(list).resolve().unwrap_err().0;
    assert!(text("c2=http://h:1").contains("not this member, \"c1\""));
    assert!(text("c1").contains("NAME=http://HOST:PORT"));
    assert!(text("c1=https://h:1").contains("http://HOST:PORT"));
    assert!(text("c1=http://h:1,c1=http://h:2").contains("twice"));
    assert!(text("c1=http://h:1,c2=http://h:1").contains("twice"));
    assert!(text(",").contains("empty"));
    assert!(text("c 1=http://h:1").contains("letters"));
    let mut bad = args("c1=http://h:1");
    bad.listen = Some("nowhere:x".into());
    assert!(bad.resolve().unwrap_err().0.contains("--listen"));
    let times = |unreachable, lease| {
        let mut args = args("c1=http://h:1");
        (args.node_unreachable_ms, args.node_lease_ms) = (unreachable, lease);
        args.resolve().map(|c| (c.node_unreachable, c.node_lease))
    };
    let default = (Duration::from_secs(20), Duration::from_secs(120));
    assert_eq!(times(None, None), Ok(default));
    assert!(times(Some(100), None).unwrap_err().0.contains("too short"));
    assert!(
        times(None, Some(20_000))
            .unwrap_err()
            .0
            .contains("more than")
    );
}

#[test]
fn flags_win_over_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.toml");
    std::fs::write(
        &path,
        "name = \"c9\"\ndata_dir = \"/x\"\nlisten = \"127.0.0.1:1\"\ncluster_token = \"t\"\n",
    )
    .unwrap();
    let mut from_file = args("c1=http://h:1");
    from_file.config = Some(path.clone());
    let config = from_file.clone().resolve().unwrap();
    assert_eq!((config.name.as_str(), config.token.as_str()), ("c1", "t"));
    assert_eq!(config.listen.port(), 1);
    // The way into the cluster is one setting: a flag for one wins over the file's other.
    std::fs::write(
        &path,
        "join = \"http://h:1\"\nlearner = true\nadvertise_host = \"x\"\n",
    )
    .unwrap();
    let error = from_file.clone().resolve().unwrap_err().0;
    assert!(error.contains("--learner"), "{error}");
    from_file.initial_cluster = None;
    let config = from_file.clone().resolve().unwrap();
    assert!(config.learner && config.join == ["http://h:1"]);
    std::fs::write(&path, "lissten = 1\n").unwrap();
    assert!(from_file.resolve().unwrap_err().0.contains("lissten"));
}

#[test]
fn a_switch_needs_no_value() {
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: ServerArgs,
    }
    let cors = |flags: &[&str]| {
        let words = [&["server"], flags].concat();
        let line = <Line as clap::Parser>::try_parse_from(words).unwrap();
        line.args.allow_cors
    };
    assert_eq!(cors(&[]), None);
    assert_eq!(cors(&["--allow-cors", "--name", "c1"]), Some(true));
    assert_eq!(cors(&["--allow-cors=no"]), Some(false));
}

#[test]
fn addresses_are_written_one_way() {
    assert_eq!(plain_url("10.0.0.1", 8090).unwrap(), "http://10.0.0.1:8090");
    assert_eq!(plain_url("http://h:1/", 8090).unwrap(), "http://h:1");
    assert_eq!(plain_url(" h:8091 ", 1).unwrap(), "http://h:8091");
    for bad in ["", "https://h", "http://h/path", "http://"] {
        assert!(
            plain_url(bad, 1)
                .unwrap_err()
                .0
                .contains("http://HOST:PORT"),
            "{bad}"
        );
    }
}

#[test]
fn a_schedule_needs_a_place_and_a_sane_pause() {
    let schedule = |dir: Option<&str>, every: Option<&str>, keep| {
        let mut args = args("c1=http://h:1");
        args.snapshot_dir = dir.map(PathBuf::from);
        args.snapshot_every = every.map(str::to_owned);
        args.snapshot_keep = keep;
        args.resolve().map(|c| c.snapshots).map_err(|e| e.0)
    };
    assert_eq!(schedule(None, None, None), Ok(None));
    let of = |s, keep| Schedule {
        dir: "/s".into(),
        every: Duration::from_secs(s),
        keep,
    };
    assert_eq!(schedule(Some("/s"), None, None), Ok(Some(of(3600, 24))));
    assert_eq!(
        schedule(Some("/s"), Some("15m"), Some(2)),
        Ok(Some(of(900, 2)))
    );
    for bad in ["", "s", "15", "0s", "-1h", "1w", "é"] {
        let error = schedule(Some("/s"), Some(bad), None).unwrap_err();
        assert!(error.contains("not a duration"), "{bad}: {error}");
    }
    assert!(schedule(Some("/s"), None, Some(0)).is_err());
    assert!(schedule(None, Some("1h"), None).is_err());
}

#[test]
fn upkeep_has_defaults_and_refuses_nonsense() {
    let upkeep = |grace: Option<&str>, every: Option<&str>, rate: Option<&str>| {
        let mut args = args("c1=http://h:1");
        args.gc_grace = grace.map(str::to_owned);
        args.gc_every = every.map(str::to_owned);
        args.scrub_rate = rate.map(str::to_owned);
        args.resolve().map(|c| c.upkeep).map_err(|e| e.0)
    };
    let usual = upkeep(None, None, None).unwrap();
    assert_eq!(usual.collect.grace, Duration::from_secs(86_400));
    assert_eq!(usual.collect.every, Some(Duration::from_secs(3_600)));
    assert_eq!(usual.scrub.rate, 16 << 20);
    let own = upkeep(Some("2s"), Some("never"), Some("0")).unwrap();
    assert_eq!(own.collect.grace, Duration::from_secs(2));
    assert_eq!((own.collect.every, own.scrub.rate), (None, 0));
    assert!(
        upkeep(Some("0s"), None, None)
            .unwrap_err()
            .contains("--gc-grace")
    );
    assert!(
        upkeep(None, Some("often"), None)
            .unwrap_err()
            .contains("--gc-every")
    );
    assert!(
        upkeep(None, None, Some("fast"))
            .unwrap_err()
            .contains("--scrub-rate")
    );
}

#[test]
fn rates_are_sizes_and_nothing_is_no_limit() {
    let rates = |gc: Option<&str>, replicate: Option<&str>| {
        let mut args = args("c1=http://h:1");
        args.gc_rate = gc.map(str::to_owned);
        args.replicate_rate = replicate.map(str::to_owned);
        let upkeep = args.resolve().map(|c| c.upkeep).map_err(|e| e.0)?;
        Ok::<_, String>((upkeep.collect.rate, upkeep.replicate_rate))
    };
    assert_eq!(rates(None, None), Ok((64 << 20, 0)));
    assert_eq!(rates(Some("0"), Some("10MiB")), Ok((0, 10 << 20)));
    assert!(
        rates(Some("slow"), None)
            .unwrap_err()
            .contains("--gc-rate slow")
    );
    assert!(
        rates(None, Some("-1"))
            .unwrap_err()
            .contains("--replicate-rate -1")
    );
}
