// Pause and resume through the official JavaScript SDK.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Sandbox, SandboxNotFoundError } from 'e2b'
import { newSandbox, rejection, waitFor } from './support.js'

const COUNTER = 'n=0; while :; do n=$((n + 1)); echo $n > /tmp/n.new; mv /tmp/n.new /tmp/n; sleep 0.1; done'

test('a paused sandbox goes on where it was', async () => {
  const sbx = await newSandbox({ metadata: { js: 'yes' } })
  await sbx.commands.run(COUNTER, { background: true, timeoutMs: 0 })
  await sbx.files.write('/home/user/note', 'before')
  const count = async (s) => Number(await s.files.read('/tmp/n'))
  await waitFor('the counter to count', async () => (await sbx.files.exists('/tmp/n')) && (await count(sbx)) > 2, 30)
  const before = await count(sbx)
  assert.equal(await sbx.pause(), true)
  assert.equal(await sbx.pause(), false, 'it is paused already')
  assert.equal((await sbx.getInfo()).state, 'paused')
  assert.equal(await sbx.isRunning(), false)
  const other = await Sandbox.connect(sbx.sandboxId)
  await waitFor('the counter to go on', async () => (await count(other)) > before, 30)
  assert.equal(await other.files.read('/home/user/note'), 'before')
  assert.equal((await other.getInfo()).state, 'running')
})

test('a paused sandbox is listed as such and can be killed', async () => {
  const sbx = await newSandbox()
  await sbx.pause()
  const listed = async (state) => {
    const pages = Sandbox.list({ query: { state: [state] } })
    const found = []
    while (pages.hasNext) for (const info of await pages.nextItems()) found.push(info.sandboxId)
    return found.includes(sbx.sandboxId)
  }
  assert.deepEqual([await listed('paused'), await listed('running')], [true, false])
  assert.equal(await sbx.kill(), true)
  assert.equal(await listed('paused'), false)
  await rejection(Sandbox.connect(sbx.sandboxId), SandboxNotFoundError)
})

test('a pause that keeps the disk alone ends processes and keeps files', async () => {
  const sbx = await newSandbox()
  const bootId = async (s) => (await s.commands.run('cat /proc/sys/kernel/random/boot_id')).stdout
  const before = await bootId(sbx)
  await sbx.commands.run('sleep 600', { background: true, timeoutMs: 0 })
  await sbx.files.write('/home/user/note', 'before')
  assert.equal(await sbx.pause({ keepMemory: false }), true)
  const other = await Sandbox.connect(sbx.sandboxId, { onResume: 'reboot', requestTimeoutMs: 180_000 })
  assert.notEqual(await bootId(other), before)
  assert.equal(await other.files.read('/home/user/note'), 'before')
  const commands = (await other.commands.list()).map((p) => [p.cmd, ...p.args].join(' '))
  assert.ok(!commands.some((c) => c.includes('sleep 600')), commands.join('; '))
})
