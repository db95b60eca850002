use proptest::prelude::*;

use super::*;

fn config(change: impl FnOnce(&mut EgressConfig)) -> EgressConfig {
    let mut config = EgressConfig::default();
    change(&mut config);
    config
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

fn rule(domain: &str, headers: &[(&str, &str)]) -> (String, Vec<HashMap<String, String>>) {
    let maps = headers.iter().map(|(n, v)| HashMap::from([(n.to_string(), v.to_string())])).collect();
    (domain.to_owned(), maps)
}

fn parse(change: impl FnOnce(&mut EgressConfig)) -> Result<Policy, PolicyError> {
    Policy::parse(&config(change), &[])
}

const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);

#[test]
fn allowed_beats_denied_and_default_is_allowed() {
    let policy = parse(|c| {
        c.allowed_cidrs = strings(&["203.0.113.7"]);
        c.denied_cidrs = strings(&["203.0.113.0/24"]);
    })
    .unwrap();
    assert_eq!(policy.decide(PUBLIC, None), Verdict::ByAddress);
    assert_eq!(policy.decide(Ipv4Addr::new(203, 0, 113, 8), None), Verdict::Deny);
    assert_eq!(policy.decide(Ipv4Addr::new(203, 0, 112, 8), None), Verdict::ByAddress);
    assert!(policy.resolves("anything.example"));
    let rules = policy.kernel_rules();
    assert_eq!((rules.redirect, rules.dns), (TcpRedirect::None, true));
}

#[test]
fn names_are_let_through_by_name_only() {
    let policy = parse(|c| {
        c.denied_cidrs = strings(&["0.0.0.0/0"]);
        c.allowed_domains = strings(&["good.example", "*.wild.example"]);
    })
    .unwrap();
    assert_eq!(policy.decide(PUBLIC, Some("good.example")), Verdict::ByName);
    assert_eq!(policy.decide(PUBLIC, Some("a.wild.example")), Verdict::ByName);
    for host in [Some("wild.example"), Some("evil.example"), Some("good.example.evil.example"), None] {
        assert_eq!(policy.decide(PUBLIC, host), Verdict::Deny, "{host:?}");
    }
    assert!(policy.resolves("good.example") && !policy.resolves("evil.example"));
    assert_eq!(policy.kernel_rules().redirect, TcpRedirect::Unlisted);
}

#[test]
fn without_internet_nothing_resolves() {
    let policy = parse(|c| c.allow_internet = false).unwrap();
    assert_eq!(policy.decide(PUBLIC, Some("good.example")), Verdict::Deny);
    assert!(!policy.resolves("good.example"));
    assert_eq!(policy.kernel_rules(), Policy::closed().kernel_rules());
}

#[test]
fn an_open_policy_costs_nothing() {
    assert_eq!(parse(|_| {}).unwrap().kernel_rules(), EgressRules::default());
    assert!(!Policy::open().looks_into("203.0.113.7:443".parse().unwrap()));
}

#[test]
fn the_most_exact_rule_wins() {
    let policy = parse(|c| {
        c.rules = HashMap::from([
            rule("*.example.com", &[("x-key", "wild"), ("x-other", "1")]),
            rule("api.example.com", &[("X-Key", "old"), ("x-key", "exact")]),
        ]);
    })
    .unwrap();
    let headers = policy.headers_for("api.example.com").unwrap();
    assert_eq!(
        (&headers["x-key"], &headers["x-other"]),
        (&HeaderValue::from_static("exact"), &HeaderValue::from_static("1"))
    );
    assert_eq!(policy.headers_for("b.example.com").unwrap()["x-key"], "wild");
    assert!(policy.headers_for("example.com").is_none());
    assert_eq!(policy.kernel_rules().redirect, TcpRedirect::Web);
    assert!(policy.looks_into("203.0.113.7:443".parse().unwrap()));
    assert!(!policy.looks_into("203.0.113.7:22".parse().unwrap()));
    assert!(!format!("{policy:?}").contains("exact"), "a secret is shown");
}

#[test]
fn what_is_wrong_is_named() {
    let wrong = |change: fn(&mut EgressConfig)| parse(change).unwrap_err().to_string();
    assert!(wrong(|c| c.denied_cidrs = strings(&["10.0.0.0/33"])).contains("10.0.0.0/33"));
    assert!(wrong(|c| c.allowed_cidrs = strings(&["fe80::1"])).contains("fe80::1"));
    assert_eq!(
        parse(|c| c.allowed_domains = strings(&["a.example"])).unwrap_err(),
        PolicyError::DomainsNeedDeny
    );
    assert!(wrong(|c| c.dns_servers = Some(strings(&["10.0.0.53"]))).contains("10.0.0.53"));
    for header in ["Host", "content-length", "Proxy-Authorization", "a b", ""] {
        let failed = parse(|c| c.rules = HashMap::from([rule("a.example", &[(header, "1")])]));
        assert!(matches!(failed, Err(PolicyError::Header { .. })), "{header}");
    }
    assert!(parse(|c| c.rules = HashMap::from([rule("a.example", &[("x", "1\r\nHost: b")])])).is_err());
    for address in
        ["127.0.0.1:1080", "10.0.0.1:1", "proxy.example", "proxy.example:0", "a b:1", "169.254.169.254:80"]
    {
        let failed =
            parse(|c| c.proxy = Some(SocksProxy { address: address.to_owned(), ..Default::default() }));
        assert!(matches!(failed, Err(PolicyError::Proxy { .. })), "{address}");
    }
}

#[test]
fn the_owner_may_open_ranges() {
    let opened = ["10.1.0.0/16".parse().unwrap()];
    let with = |address: &str| {
        let proxy = SocksProxy {
            address: address.to_owned(),
            username: "u".into(),
            password: "secret".into(),
            tls: None,
        };
        Policy::parse(&config(|c| c.proxy = Some(proxy)), &opened)
    };
    let policy = with("10.1.2.3:1080").unwrap();
    assert_eq!(policy.kernel_rules().redirect, TcpRedirect::All);
    assert!(!format!("{policy:?}").contains("secret"), "a secret is shown");
    assert!(with("10.2.2.3:1080").is_err());
}

fn net() -> impl Strategy<Value = Ipv4Net> {
    (0u32..64, 24u8..=32).prop_map(|(low, length)| {
        Ipv4Net::new_assert(Ipv4Addr::from_bits(u32::from(PUBLIC) & !0xff | low), length).trunc()
    })
}

proptest! {
    /// The words of the contract, entry by entry.
    #[test]
    fn decisions_are_those_of_the_words(
        allowed in prop::collection::vec(net(), 0..4),
        denied in prop::collection::vec(net(), 0..4),
        all in any::<bool>(),
        low in 0u32..64,
        host in prop::option::of(prop::sample::select(vec!["a.b", "c.a.b", "d"])),
        domains in prop::collection::vec(prop::sample::select(vec!["a.b", "*.b", "*.a.b", "d", "*"]), 0..3),
    ) {
        let written = |nets: &[Ipv4Net]| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
        let config = config(|c| {
            c.allowed_cidrs = written(&allowed);
            c.denied_cidrs = written(&denied);
            if all { c.denied_cidrs.push("0.0.0.0/0".to_owned()); }
            if all { c.allowed_domains = strings(&domains); }
        });
        let policy = Policy::parse(&config, &[]).unwrap();
        let ip = Ipv4Addr::from_bits(u32::from(PUBLIC) & !0xff | low);
        let named = all && host.is_some_and(|host| domains.iter().any(|d| match *d {
            "*" => true,
            "*.b" => host == "a.b" || host == "c.a.b",
            "*.a.b" => host == "c.a.b",
            exact => exact == host,
        }));
        let expected = if allowed.iter().any(|n| n.contains(&ip)) {
            Verdict::ByAddress
        } else if named {
            Verdict::ByName
        } else if all || denied.iter().any(|n| n.contains(&ip)) {
            Verdict::Deny
        } else {
            Verdict::ByAddress
        };
        prop_assert_eq!(policy.decide(ip, host), expected);
    }
}
