// Forks and snapshots through the official JavaScript SDK.
import assert from 'node:assert/strict'
import { after, test } from 'node:test'
import { Sandbox, SandboxNotFoundError } from 'e2b'
import { newSandbox, rejection, waitFor } from './support.js'

const COUNTER = 'n=0; while :; do n=$((n + 1)); echo $n > /tmp/n.new; mv /tmp/n.new /tmp/n; sleep 0.1; done'

const forked = []
after(() => Promise.all(forked.map((sandbox) => sandbox.kill())))

async function counting() {
  const sbx = await newSandbox({ metadata: { js: 'fork' } })
  await sbx.commands.run(COUNTER, { background: true, timeoutMs: 0 })
  const count = async (s) => Number(await s.files.read('/tmp/n'))
  await waitFor('the counter to count', async () => (await sbx.files.exists('/tmp/n')) && (await count(sbx)) > 2, 30)
  return [sbx, count]
}

test('forks go on where their parent was, and it runs on', async () => {
  const [parent, count] = await counting()
  await parent.files.write('/home/user/note', 'parent')
  const before = await count(parent)
  const forks = await parent.fork({ count: 2 })
  for (const fork of forks) assert.ok(fork instanceof Sandbox, String(fork))
  forked.push(...forks)
  for (const [n, fork] of forks.entries()) {
    await fork.files.write('/home/user/note', `fork ${n}`)
    await waitFor('the counter to go on', async () => (await count(fork)) > before, 30)
    assert.deepEqual((await fork.getInfo()).metadata, { js: 'fork' })
  }
  assert.equal(await forks[0].kill(), true)
  assert.equal(await forks[1].files.read('/home/user/note'), 'fork 1')
  const now = await count(parent)
  await waitFor('the parent to run on', async () => (await count(parent)) > now, 30)
  assert.equal(await parent.files.read('/home/user/note'), 'parent')
  await rejection(Sandbox.fork('inosuch'), SandboxNotFoundError)
})

test('a snapshot is listed, used and deleted', async () => {
  const [source, count] = await counting()
  const before = await count(source)
  const { snapshotId } = await source.createSnapshot()
  const listed = async () => {
    const pages = source.listSnapshots()
    const found = []
    while (pages.hasNext) for (const info of await pages.nextItems()) found.push(info.snapshotId)
    return found
  }
  assert.deepEqual(await listed(), [snapshotId])
  await source.kill()
  const other = await Sandbox.create(snapshotId)
  forked.push(other)
  await waitFor('the counter to go on', async () => (await count(other)) > before, 30)
  assert.equal(await Sandbox.deleteSnapshot(snapshotId), true)
  assert.equal(await Sandbox.deleteSnapshot(snapshotId), false)
  assert.deepEqual(await listed(), [])
})
