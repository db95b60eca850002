//! From one process to any number of streams.

use std::pin::Pin;
use std::time::Duration;

use futures::{Stream, stream};
use nidus_envd_protocol::connect::ConnectError;
use nidus_envd_protocol::process::process_event::{DataEvent, EndEvent, Event, KeepAlive, StartEvent};
use nidus_envd_protocol::process::{ConnectResponse, ProcessEvent, StartResponse};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep};

use crate::rpc::{Caller, too_late};

/// Pieces that wait for one slow reader before the process has to.
const QUEUE: usize = 64;

/// What a subscriber gets, in order.
#[derive(Debug, Clone)]
pub enum Item {
    Data(DataEvent),
    End(EndEvent),
}

/// All subscribers of a process.
#[derive(Default)]
pub struct Fanout {
    subscribers: Mutex<Vec<mpsc::Sender<Item>>>,
}

impl Fanout {
    /// Everything from now on.
    pub fn subscribe(&self) -> mpsc::Receiver<Item> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        self.subscribers.lock().push(sender);
        receiver
    }

    /// Hands a piece to all. A slow one holds the process up, as a full pipe would; one that is
    /// gone is forgotten. With none, the piece is lost: nobody asked for it.
    pub async fn send(&self, item: Item) {
        let subscribers = self.subscribers.lock().clone();
        let mut gone = false;
        for s in &subscribers {
            gone |= s.send(item.clone()).await.is_err();
        }
        if gone {
            self.subscribers.lock().retain(|s| !s.is_closed());
        }
    }

    /// The last one: streams end after it.
    pub async fn finish(&self, end: EndEvent) {
        let subscribers = std::mem::take(&mut *self.subscribers.lock());
        for s in subscribers {
            let _ = s.send(Item::End(end.clone())).await;
        }
    }
}

/// The events of `Start`.
pub fn start_stream(
    pid: u32,
    items: mpsc::Receiver<Item>,
    caller: &Caller,
) -> impl Stream<Item = Result<StartResponse, ConnectError>> + Send + use<> {
    use futures::StreamExt;
    events(pid, items, caller).map(|event| Ok(StartResponse { event: Some(event?) }))
}

/// The events of `Connect`.
pub fn connect_stream(
    pid: u32,
    items: mpsc::Receiver<Item>,
    caller: &Caller,
) -> impl Stream<Item = Result<ConnectResponse, ConnectError>> + Send + use<> {
    use futures::StreamExt;
    events(pid, items, caller).map(|event| Ok(ConnectResponse { event: Some(event?) }))
}

struct Events {
    items: mpsc::Receiver<Item>,
    start: Option<u32>,
    deadline: Option<Pin<Box<Sleep>>>,
    keepalive: Duration,
    timer: Pin<Box<Sleep>>,
    over: bool,
}

fn events(
    pid: u32,
    items: mpsc::Receiver<Item>,
    caller: &Caller,
) -> impl Stream<Item = Result<ProcessEvent, ConnectError>> + Send + use<> {
    let state = Events {
        items,
        start: Some(pid),
        deadline: caller.deadline.map(|at| Box::pin(tokio::time::sleep_until(at))),
        keepalive: caller.keepalive,
        timer: Box::pin(tokio::time::sleep(caller.keepalive)),
        over: false,
    };
    stream::unfold(state, |mut state| async move {
        if state.over {
            return None;
        }
        let event = match state.start.take() {
            Some(pid) => Ok(Event::Start(StartEvent { pid })),
            None => state.next().await?,
        };
        state.over = matches!(event, Err(_) | Ok(Event::End(_)));
        Some((event.map(|event| ProcessEvent { event: Some(event) }), state))
    })
}

impl Events {
    async fn next(&mut self) -> Option<Result<Event, ConnectError>> {
        let deadline = async {
            match &mut self.deadline {
                Some(at) => at.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = deadline => Some(Err(too_late())),
            item = self.items.recv() => Some(Ok(match item? {
                Item::Data(data) => Event::Data(data),
                Item::End(end) => Event::End(end),
            })),
            () = &mut self.timer => {
                self.timer.as_mut().reset(Instant::now() + self.keepalive);
                Some(Ok(Event::Keepalive(KeepAlive {})))
            }
        }
    }
}
