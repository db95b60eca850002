// A server inside the sandbox, reached from JavaScript through the proxy.
import assert from 'node:assert/strict'
import http from 'node:http'
import http2 from 'node:http2'
import { before, test } from 'node:test'
import { WebSocket } from 'undici'
import { guestFile, newSandbox, sandboxUrl, waitFor } from './support.js'

const PORT = 8000
let sbx
let route

before(async () => {
  sbx = await newSandbox()
  await sbx.files.write('/home/user/server.py', guestFile('guest_server.py'))
  let up = false
  await sbx.commands.run(`python3 -u /home/user/server.py ${PORT}`, {
    background: true,
    timeoutMs: 0,
    onStdout: (text) => {
      up ||= text.includes('listening')
    },
  })
  await waitFor('the server in the sandbox', () => up, 60)
  route = { 'E2b-Sandbox-Id': sbx.sandboxId, 'E2b-Sandbox-Port': String(PORT) }
})

/** GET with any headers (fetch does not let one set Host). */
const get = (path, headers) =>
  new Promise((resolve, reject) => {
    const request = http.get(sandboxUrl + path, { headers }, (answer) => {
      let text = ''
      answer.setEncoding('utf8').on('data', (piece) => (text += piece)).on('end', () => resolve({ status: answer.statusCode, text })).on('error', reject)
    })
    request.on('error', reject)
  })

test('by headers and by host name', async () => {
  for (const headers of [route, { Host: sbx.getHost(PORT) }])
    assert.deepEqual(await get('/hello', headers), { status: 200, text: 'hello from the sandbox\n' })
})

test('fetch posts and gets', async () => {
  const answer = await fetch(`${sandboxUrl}/echo?q=%C5%BE`, { method: 'POST', headers: route, body: 'žluť' })
  const seen = await answer.json()
  assert.deepEqual([seen.method, seen.path, Buffer.from(seen.body, 'base64').toString()], ['POST', '/echo?q=%C5%BE', 'žluť'])
})

test('an answer streams as it is made', async () => {
  const answer = await fetch(`${sandboxUrl}/sse`, { headers: route })
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader()
  let text = ''
  while (!text.includes('one')) text += (await reader.read()).value
  assert.ok(!text.includes('two'))
  await fetch(`${sandboxUrl}/go`, { headers: route })
  for (let piece; !(piece = await reader.read()).done; ) text += piece.value
  assert.equal(text, 'data: one\n\ndata: two\n\n')
})

test('a body streams as it is sent', async () => {
  async function* body() {
    yield Buffer.alloc(1000, 'a')
    await waitFor('the first piece to arrive', async () => (await (await fetch(`${sandboxUrl}/upload-state`, { headers: route })).text()) === '1000', 30)
    yield Buffer.alloc(1000, 'b')
  }
  const answer = await fetch(`${sandboxUrl}/upload`, { method: 'POST', headers: route, body: body(), duplex: 'half' })
  assert.equal((await answer.json()).size, 2000)
})

test('h2c with prior knowledge', async () => {
  const session = http2.connect(sandboxUrl)
  try {
    const stream = session.request({ ':path': '/hello', ...Object.fromEntries(Object.entries(route).map(([k, v]) => [k.toLowerCase(), v])) })
    let text = ''
    let status
    stream.on('response', (headers) => (status = headers[':status']))
    for await (const piece of stream) text += piece
    assert.deepEqual([status, text], [200, 'hello from the sandbox\n'])
  } finally {
    session.close()
  }
})

test('WebSocket', async () => {
  const ws = new WebSocket(`${sandboxUrl.replace('http', 'ws')}/ws`, { headers: route })
  ws.binaryType = 'arraybuffer'
  const next = () =>
    new Promise((resolve, reject) => {
      ws.addEventListener('message', (event) => resolve(event.data), { once: true })
      ws.addEventListener('error', (event) => reject(event.error ?? new Error('WebSocket failed')), { once: true })
    })
  await new Promise((resolve, reject) => {
    ws.addEventListener('open', resolve, { once: true })
    ws.addEventListener('error', (event) => reject(event.error ?? new Error('WebSocket failed')), { once: true })
  })
  let answer = next()
  ws.send('žluť')
  assert.equal(await answer, 'žluť')
  answer = next()
  ws.send(Buffer.alloc(100_000, 7))
  assert.equal(Buffer.compare(Buffer.from(await answer), Buffer.alloc(100_000, 7)), 0)
  const closed = new Promise((resolve) => ws.addEventListener('close', resolve, { once: true }))
  ws.close()
  await closed
})
