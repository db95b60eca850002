//! The flows of one sandbox that the gateway carries, each with what it was let through for, so that another
//! policy cuts those that it does not allow and no others.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use crate::policy::Verdict;
use crate::{Policy, SocksProxy};

/// What a flow was let through for.
#[derive(Debug, Clone)]
struct Flow {
    destination: Ipv4Addr,
    host: Option<String>,
    /// Nothing of it has left yet: each of its requests is decided on by itself.
    undecided: bool,
    proxy: Option<SocksProxy>,
    cut: CancellationToken,
}

impl Flow {
    fn allowed_by(&self, policy: &Policy) -> bool {
        let there = policy.decide(self.destination, self.host.as_deref()) != Verdict::Deny;
        (there || self.undecided) && policy.proxy() == self.proxy.as_ref()
    }
}

struct State {
    policy: Policy,
    flows: HashMap<u64, Flow>,
    next: u64,
}

/// The policy in force and the flows under it. They change together: no flow is between two policies.
pub struct Flows(Mutex<State>);

impl Flows {
    pub fn new(policy: Policy) -> Self {
        Self(Mutex::new(State { policy, flows: HashMap::new(), next: 0 }))
    }

    pub fn policy(&self) -> Policy {
        self.0.lock().policy.clone()
    }

    /// Puts another policy in force; answers how many flows it cut.
    pub fn replace(&self, policy: Policy) -> usize {
        let mut state = self.0.lock();
        let cut: Vec<_> = state.flows.values().filter(|flow| !flow.allowed_by(&policy)).collect();
        for flow in &cut {
            flow.cut.cancel();
        }
        let n = cut.len();
        state.policy = policy;
        n
    }

    /// Notes a flow, under the policy that it was let through by; `None` when another one is in force
    /// that does not allow it. Of one that is `undecided` each request is decided on, by
    /// [`FlowGuard::turn_to`].
    pub fn enter(
        self: &Arc<Self>,
        policy: &Policy,
        destination: Ipv4Addr,
        host: Option<String>,
        undecided: bool,
    ) -> Option<FlowGuard> {
        let cut = CancellationToken::new();
        let proxy = policy.proxy().cloned();
        let flow = Flow { destination, host, undecided, proxy, cut: cut.clone() };
        let mut state = self.0.lock();
        if !flow.allowed_by(&state.policy) {
            return None;
        }
        let id = state.next;
        state.next += 1;
        state.flows.insert(id, flow);
        Some(FlowGuard { flows: self.clone(), id, cut, permit: None })
    }
}

/// A flow as long as it lasts.
pub struct FlowGuard {
    flows: Arc<Flows>,
    id: u64,
    cut: CancellationToken,
    permit: Option<OwnedSemaphorePermit>,
}

impl FlowGuard {
    /// Keeps the flow's place among those of its sandbox as long as it lasts.
    pub fn hold(&mut self, permit: OwnedSemaphorePermit) {
        self.permit = Some(permit);
    }

    /// Cancelled when it must end.
    pub fn cut(&self) -> &CancellationToken {
        &self.cut
    }

    /// The flow now asks for this host; answers the policy that says yes to that, or `None`.
    pub fn turn_to(&self, host: Option<&str>) -> Option<Policy> {
        let mut state = self.flows.0.lock();
        let policy = state.policy.clone();
        let flow = state.flows.get_mut(&self.id)?;
        let turned = Flow { host: host.map(str::to_owned), undecided: false, ..flow.clone() };
        // Otherwise what was asked before may still be answered.
        turned.allowed_by(&policy).then(|| {
            *flow = turned;
            policy
        })
    }
}

impl Drop for FlowGuard {
    fn drop(&mut self) {
        self.flows.0.lock().flows.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EgressConfig;

    fn policy(domains: &[&str], cidrs: &[&str]) -> Policy {
        let strings = |list: &[&str]| list.iter().map(ToString::to_string).collect();
        let config = EgressConfig {
            allow_internet: false,
            allowed_domains: strings(domains),
            allowed_cidrs: strings(cidrs),
            ..EgressConfig::default()
        };
        Policy::parse(&config, &[]).unwrap()
    }

    #[test]
    fn another_policy_cuts_what_it_does_not_allow() {
        let ip = Ipv4Addr::new(203, 0, 113, 1);
        let first = policy(&["a.example", "b.example"], &["203.0.113.1"]);
        let flows = Arc::new(Flows::new(first.clone()));
        let enter = |host: Option<&str>, ip| flows.enter(&first, ip, host.map(str::to_owned), false).unwrap();
        let a = enter(Some("a.example"), Ipv4Addr::new(198, 51, 100, 1));
        let b = enter(Some("b.example"), Ipv4Addr::new(198, 51, 100, 1));
        let address = enter(None, ip);
        let second = policy(&["a.example"], &["203.0.113.1"]);
        assert_eq!(flows.replace(second), 1);
        assert!(b.cut().is_cancelled() && !a.cut().is_cancelled() && !address.cut().is_cancelled());
        assert!(
            flows.enter(&first, Ipv4Addr::new(198, 51, 100, 1), Some("b.example".into()), false).is_none()
        );
        assert!(a.turn_to(Some("b.example")).is_none());
        assert!(a.turn_to(Some("a.example")).is_some());
        drop(b);
        assert_eq!(flows.replace(Policy::closed()), 2);
    }

    #[test]
    fn a_flow_beside_a_new_proxy_is_cut() {
        let flows = Arc::new(Flows::new(Policy::open()));
        let flow = flows.enter(&Policy::open(), Ipv4Addr::new(203, 0, 113, 1), None, false).unwrap();
        let proxy = SocksProxy { address: "203.0.113.2:1080".into(), ..Default::default() };
        let with = EgressConfig { proxy: Some(proxy), ..EgressConfig::default() };
        assert_eq!(flows.replace(Policy::parse(&with, &[]).unwrap()), 1);
        assert!(flow.cut().is_cancelled());
    }
}
