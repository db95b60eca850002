// Create, list, look at, prolong, connect to and kill through the official JavaScript SDK.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { test } from 'node:test'
import { AuthenticationError, Sandbox, SandboxNotFoundError, TimeoutError } from 'e2b'
import { newSandbox, rejection, rest, waitFor } from './support.js'

async function ids(paginator) {
  const found = []
  while (paginator.hasNext) for (const info of await paginator.nextItems()) found.push(info.sandboxId)
  return found
}

test('create with envs and metadata, look at it, list it', async () => {
  const run = randomUUID()
  const metadata = { run, user: 'žluťoučký kůň', 'a b': 'x=1&y=2 %41 +' }
  const sbx = await newSandbox({ envs: { TOKEN: "s3 cr'et" }, metadata, timeoutMs: 120_000 })
  assert.equal((await sbx.commands.run('echo "$TOKEN"')).stdout, "s3 cr'et\n")
  const info = await sbx.getInfo()
  assert.equal(info.sandboxId, sbx.sandboxId)
  assert.deepEqual(info.metadata, metadata)
  assert.deepEqual([info.state, info.name], ['running', 'base'])
  assert.ok(Math.abs(info.endAt - info.startedAt - 120_000) <= 2000)
  assert.equal(await sbx.isRunning(), true)
  assert.deepEqual(await ids(Sandbox.list({ query: { metadata } })), [sbx.sandboxId])
  assert.deepEqual(await ids(Sandbox.list({ query: { metadata: { run }, state: ['running'] } })), [sbx.sandboxId])
  assert.deepEqual(await ids(Sandbox.list({ query: { metadata: { run }, state: ['paused'] } })), [])
  assert.deepEqual(await ids(Sandbox.list({ query: { metadata: { run: randomUUID() } } })), [])
})

test('pages', async () => {
  const run = randomUUID()
  const made = []
  for (let n = 0; n < 3; n++) made.push((await newSandbox({ metadata: { run } })).sandboxId)
  const pages = Sandbox.list({ query: { metadata: { run } }, limit: 2 })
  const first = await pages.nextItems()
  assert.deepEqual([first.length, pages.hasNext], [2, true])
  const second = await pages.nextItems()
  assert.deepEqual([second.length, pages.hasNext], [1, false])
  assert.deepEqual([...first, ...second].map((info) => info.sandboxId).sort(), made.sort())
})

test('setTimeout, and the end comes by itself', async () => {
  const sbx = await newSandbox({ timeoutMs: 600_000 })
  await sbx.setTimeout(5000)
  const end = (await sbx.getInfo()).endAt
  await waitFor('the sandbox to end', async () => !(await sbx.isRunning()), 40)
  assert.ok(Date.now() >= end - 1000, 'it was killed before its end time')
  await rejection(sbx.getInfo(), SandboxNotFoundError)
})

test('connect to a running one', async () => {
  const sbx = await newSandbox({ envs: { KEPT: 'yes' } })
  const other = await Sandbox.connect(sbx.sandboxId)
  assert.equal(other.sandboxId, sbx.sandboxId)
  assert.equal((await other.commands.run('echo $KEPT')).stdout, 'yes\n')
  const before = (await sbx.getInfo()).endAt
  await other.connect({ timeoutMs: 900_000 })
  assert.ok((await sbx.getInfo()).endAt > before)
})

test('kill and what is left', async () => {
  const sbx = await newSandbox()
  assert.equal(await sbx.kill(), true)
  assert.equal(await sbx.isRunning(), false)
  assert.equal(await sbx.kill(), false)
  assert.equal(await Sandbox.kill(sbx.sandboxId), false)
  await rejection(sbx.getInfo(), SandboxNotFoundError)
  await rejection(sbx.setTimeout(60_000), SandboxNotFoundError)
  await rejection(Sandbox.connect(sbx.sandboxId), SandboxNotFoundError)
  await rejection(sbx.commands.run('echo ghost'), SandboxNotFoundError)
  await rejection(sbx.files.read('/etc/hostname'), TimeoutError)
  for (const [method, path, body] of [
    ['GET', '', undefined],
    ['DELETE', '', undefined],
    ['POST', '/timeout', { timeout: 60 }],
    ['POST', '/connect', { timeout: 60 }],
  ]) {
    const answer = await rest(method, `/sandboxes/${sbx.sandboxId}${path}`, body)
    assert.equal(answer.status, 404, `${method} ${path}`)
    assert.equal(answer.body.code, 404)
    assert.equal(typeof answer.body.message, 'string')
  }
})

test('bad keys and templates', async () => {
  await rejection(Sandbox.create({ apiKey: 'e2b_' + '0'.repeat(40) }), AuthenticationError)
  await assert.rejects(Sandbox.create('no-such-template'), /no-such-template/)
})

test('sandboxes created at once', async () => {
  const sandboxes = await Promise.all([0, 1, 2, 3].map(() => newSandbox()))
  assert.equal(new Set(sandboxes.map((sbx) => sbx.sandboxId)).size, 4)
  const results = await Promise.all(sandboxes.map((sbx, n) => sbx.commands.run(`echo ${n}; cat /proc/sys/kernel/random/uuid`)))
  results.forEach((result, n) => assert.ok(result.stdout.startsWith(`${n}\n`)))
  assert.equal(new Set(results.map((result) => result.stdout.split('\n')[1])).size, 4)
  await Promise.all(sandboxes.map((sbx) => sbx.kill()))
})
