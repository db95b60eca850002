//! Links, addresses, routes and neighbours over netlink (rtnetlink(7)).

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use futures::TryStreamExt;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder, new_connection};

use crate::namespace::Namespace;
use crate::slot::Addresses;
use crate::{GUEST_IP, GUEST_MAC_BYTES, NetworkError, TAP_IP, TAP_MAC_BYTES, TAP_NAME};

/// Runs netlink requests in the calling thread's namespace, on a thread (which inherits the
/// namespace) and a runtime of their own: the caller may be inside one.
fn with_handle<T: Send>(
    work: impl AsyncFnOnce(Handle) -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    std::thread::scope(|s| s.spawn(|| on_runtime(work)).join()).unwrap_or_else(|_| {
        Err(NetworkError::io("work over netlink", std::io::Error::other("the thread panicked")))
    })
}

fn on_runtime<T>(work: impl AsyncFnOnce(Handle) -> Result<T, NetworkError>) -> Result<T, NetworkError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(|e| NetworkError::io("start a runtime for netlink", e))?;
    runtime.block_on(async {
        let (connection, handle, _) =
            new_connection().map_err(|e| NetworkError::io("open a netlink socket", e))?;
        let task = tokio::spawn(connection);
        let result = work(handle).await;
        task.abort();
        result
    })
}

fn fail(action: String) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    move |source| NetworkError::Netlink { action, source }
}

async fn index(handle: &Handle, name: &str) -> Result<u32, NetworkError> {
    let what = || format!("find the link {name}");
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    let link = links.try_next().await.map_err(fail(what()))?;
    link.map(|l| l.header.index)
        .ok_or_else(|| NetworkError::io(what(), std::io::Error::from(std::io::ErrorKind::NotFound)))
}

async fn up(handle: &Handle, index: u32, name: &str) -> Result<(), NetworkError> {
    let message = LinkUnspec::new_with_index(index).up().build();
    handle.link().set(message).execute().await.map_err(fail(format!("bring up {name}")))
}

async fn address(
    handle: &Handle,
    index: u32,
    ip: Ipv4Addr,
    prefix: u8,
    name: &str,
) -> Result<(), NetworkError> {
    handle
        .address()
        .add(index, IpAddr::V4(ip), prefix)
        .execute()
        .await
        .map_err(fail(format!("give {name} the address {ip}/{prefix}")))
}

async fn route(
    handle: &Handle,
    to: Ipv4Addr,
    prefix: u8,
    via: Ipv4Addr,
    out: u32,
) -> Result<(), NetworkError> {
    let message = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(to, prefix)
        .gateway(via)
        .output_interface(out)
        .build();
    handle.route().add(message).execute().await.map_err(fail(format!("add the route to {to}/{prefix}")))
}

/// Inside the namespace: the pair, of which one end is moved to the host, addresses, the default
/// route, and the guest as a permanent neighbour so that a resumed guest need not answer ARP first.
pub fn configure_inside(a: &Addresses, host: &Namespace) -> Result<(), NetworkError> {
    with_handle(async |handle| {
        let pair = LinkVeth::new("eth0", &a.veth).build();
        handle.link().add(pair).execute().await.map_err(fail(format!("make the pair {}", a.veth)))?;
        let veth = index(&handle, &a.veth).await?;
        let away = LinkUnspec::new_with_index(veth).setns_by_fd(host.as_raw_fd()).build();
        handle.link().set(away).execute().await.map_err(fail(format!("move {} to the host", a.veth)))?;
        let lo = index(&handle, "lo").await?;
        up(&handle, lo, "lo").await?;
        let eth0 = index(&handle, "eth0").await?;
        address(&handle, eth0, a.inner_ip, 31, "eth0").await?;
        up(&handle, eth0, "eth0").await?;
        route(&handle, Ipv4Addr::UNSPECIFIED, 0, a.outer_ip, eth0).await?;
        tap(&handle).await
    })
}

/// The tap once more, after it was made again: all that [`configure_inside`] gave the old one.
pub fn configure_tap() -> Result<(), NetworkError> {
    with_handle(async |handle| tap(&handle).await)
}

async fn tap(handle: &Handle) -> Result<(), NetworkError> {
    let tap = index(handle, TAP_NAME).await?;
    let mac = LinkUnspec::new_with_index(tap).address(TAP_MAC_BYTES.to_vec()).build();
    handle.link().set(mac).execute().await.map_err(fail("set the tap's MAC".into()))?;
    address(handle, tap, TAP_IP, 30, TAP_NAME).await?;
    up(handle, tap, TAP_NAME).await?;
    handle
        .neighbours()
        .add(tap, IpAddr::V4(GUEST_IP))
        .link_layer_address(&GUEST_MAC_BYTES)
        .execute()
        .await
        .map_err(fail("enter the guest as a neighbour".into()))
}

/// Links, addresses and routes of the calling thread's namespace, a line each, in an order of their own: two
/// namespaces that are alike have the same.
pub fn state() -> Result<Vec<String>, NetworkError> {
    use netlink_packet_route::address::AddressAttribute;
    use netlink_packet_route::route::RouteAttribute;
    with_handle(async |handle| {
        let links: Vec<_> =
            handle.link().get().execute().try_collect().await.map_err(fail("list the links".into()))?;
        let names: HashMap<u32, &str> =
            links.iter().map(|l| (l.header.index, name_of(l).unwrap_or_default())).collect();
        let name = |index: u32| names.get(&index).copied().unwrap_or_default();
        let mut lines: Vec<String> = links.iter().map(|l| format!("link {}", name(l.header.index))).collect();
        let addresses: Vec<_> = handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(fail("list the addresses".into()))?;
        for a in addresses {
            let ip = a.attributes.iter().find_map(|x| match x {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            });
            lines.push(format!("address {} {ip:?}/{}", name(a.header.index), a.header.prefix_len));
        }
        let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes: Vec<_> =
            handle.route().get(all).execute().try_collect().await.map_err(fail("list the routes".into()))?;
        for r in routes {
            let mut parts: Vec<String> = r
                .attributes
                .iter()
                .filter_map(|a| match a {
                    RouteAttribute::Oif(index) => Some(format!("dev {}", name(*index))),
                    RouteAttribute::CacheInfo(_) => None,
                    other => Some(format!("{other:?}")),
                })
                .collect();
            parts.sort();
            let h = r.header;
            lines.push(format!(
                "route /{} {:?} {:?} {}",
                h.destination_prefix_length,
                h.kind,
                h.scope,
                parts.join(" ")
            ));
        }
        lines.sort();
        Ok(lines)
    })
}

/// On the host: the pair's outer end and the route to the slot's host address.
pub fn configure_host(a: &Addresses) -> Result<(), NetworkError> {
    with_handle(async |handle| {
        let veth = index(&handle, &a.veth).await?;
        address(&handle, veth, a.outer_ip, 31, &a.veth).await?;
        up(&handle, veth, &a.veth).await?;
        route(&handle, a.host_ip, 32, a.inner_ip, veth).await
    })
}

/// Removes the host's end of a pair (and with it the other), if it is there.
pub fn remove_veth(name: &str) -> Result<(), NetworkError> {
    with_handle(async |handle| {
        let Ok(veth) = index(&handle, name).await else { return Ok(()) };
        match handle.link().del(veth).execute().await {
            // The kernel was removing it too, with its namespace.
            Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -libc::ENODEV => Ok(()),
            done => done.map_err(fail(format!("remove {name}"))),
        }
    })
}

/// Names of all links here that begin with `prefix`.
pub fn names(prefix: &str) -> Result<Vec<String>, NetworkError> {
    with_handle(async |handle| {
        let links: Vec<_> =
            handle.link().get().execute().try_collect().await.map_err(fail("list the links".into()))?;
        Ok(links.iter().filter_map(name_of).filter(|n| n.starts_with(prefix)).map(str::to_owned).collect())
    })
}

fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}
