// E2B's own command line, unmodified: it is told where nidus is by the three variables and nothing else.
import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'
import { fileURLToPath } from 'node:url'

const program = fileURLToPath(new URL('node_modules/@e2b/cli/dist/index.js', import.meta.url))
const name = `cli-${randomUUID().slice(0, 8)}`
const timeout = 240_000
let folder

const DOCKERFILE = `FROM debian:bookworm
WORKDIR /app
COPY hello.txt /app/hello.txt
ENV MADE_BY=cli
RUN echo "made by $MADE_BY" > /app/built
USER user
`

/** Exit status and output of a command; `input` is written to it. */
function run (command, args, input) {
  return new Promise((resolve) => {
    const child = execFile(command, args, { cwd: folder, timeout }, (error, stdout, stderr) =>
      resolve({ status: error ? error.code : 0, out: stdout + stderr }))
    child.stdin.end(input ?? '')
  })
}

const commands = new Set()

async function e2b (...args) {
  const { status, out } = await run(process.execPath, [program, ...args])
  assert.equal(status, 0, out)
  commands.add(args.slice(0, 2).join(' '))
  return out
}

// For docs/compatibility.md (support/tables.py).
process.on('exit', (code) => {
  const folder = process.env.NIDUS_REPORT_DIR
  if (!folder || code) return
  const { version } = JSON.parse(readFileSync(new URL('node_modules/@e2b/cli/package.json', import.meta.url), 'utf8'))
  mkdirSync(folder, { recursive: true })
  writeFileSync(join(folder, 'cli.json'), JSON.stringify({ version, commands: [...commands] }))
})

const create = () => e2b('template', 'create', name, '--cmd', 'sleep 1000', '--ready-cmd', 'test -f /app/built', '--memory-mb', '512', '--cpu-count', '1')

before(async () => {
  folder = await mkdtemp(join(tmpdir(), 'cli-'))
  await writeFile(join(folder, 'Dockerfile'), DOCKERFILE)
  await writeFile(join(folder, 'hello.txt'), 'hi from a file\n')
})
after(() => rm(folder, { recursive: true }))

test('a template is created of a Dockerfile, and again of the cache', { timeout }, async () => {
  assert.match(await create(), /Building sandbox template .* finished/)
  const again = await create()
  assert.match(again, /CACHED .*RUN echo/)
  assert.match(again, /: 0 steps done, \d+ from the cache/)
  const listed = JSON.parse(await e2b('template', 'list', '--format', 'json'))
  const [mine] = listed.filter((t) => t.names.includes(name))
  assert.deepEqual([mine.cpuCount, mine.memoryMB, mine.buildStatus, mine.public], [1, 512, 'ready', false])
})

test('a failed step ends it, with what it said', { timeout }, async () => {
  await writeFile(join(folder, 'bad.Dockerfile'), 'FROM debian:bookworm\nRUN echo "what went wrong" && exit 3\n')
  const { status, out } = await run(process.execPath, [program, 'template', 'create', `${name}-bad`, '-d', 'bad.Dockerfile', '--memory-mb', '512', '--cpu-count', '1'])
  assert.notEqual(status, 0)
  assert.match(out, /what went wrong/)
  await e2b('template', 'delete', '-y', `${name}-bad`)
})

test('a sandbox of it: created, listed, commands, terminal, paused, resumed, killed', { timeout }, async () => {
  const made = await e2b('sandbox', 'create', '--detach', '--timeout', '600', name)
  const [id] = made.match(/\bi[a-z0-9]{19,}\b/)
  const exec = (...args) => e2b('sandbox', 'exec', id, ...args)
  assert.equal(await exec('cat', '/app/hello.txt', '/app/built'), 'hi from a file\nmade by cli\n')
  const failed = await run(process.execPath, [program, 'sandbox', 'exec', id, '--', 'sh', '-c', 'exit 3'])
  assert.equal(failed.status, 3)
  const piped = await run(process.execPath, [program, 'sandbox', 'exec', id, 'wc', '-c'], 'x'.repeat(100_000))
  assert.equal(piped.out.trim(), '100000')
  const listed = JSON.parse(await e2b('sandbox', 'list', '--format', 'json'))
  assert.equal(listed.find((s) => s.sandboxId === id).state, 'running')
  assert.match(await e2b('sandbox', 'info', id), new RegExp(`Sandbox ID: ${id}[^]*Alias: ${name}`))
  // It wants a terminal of its own.
  const connect = `'${process.execPath}' '${program}' sandbox connect ${id}`
  const terminal = await run('script', ['-qec', connect, '/dev/null'], 'echo in-the-$((1+1))-terminal\nexit\n')
  assert.match(terminal.out, /in-the-2-terminal/)
  await e2b('sandbox', 'pause', id)
  assert.equal(JSON.parse(await e2b('sandbox', 'list', '--state', 'paused', '--format', 'json')).filter((s) => s.sandboxId === id).length, 1)
  await e2b('sandbox', 'resume', id)
  assert.equal(await exec('cat', '/app/built'), 'made by cli\n')
  await exec('curl', '-s', '-d', '{"message":"the app says so","level":"warn","logger":"app"}', 'http://192.0.2.1/logs')
  const logs = await e2b('sandbox', 'logs', '--format', 'json', id)
  const said = logs.trim().split('\n').map((line) => JSON.parse(line))
  assert.deepEqual(said.map((entry) => entry.message), ['Sandbox created', 'Sandbox paused', 'Sandbox resumed', 'the app says so'])
  assert.match(await e2b('sandbox', 'logs', '--level', 'WARN', id), /WARN[^]*app[^]*the app says so/)
  let metrics = ''
  for (const end = Date.now() + 60_000; !metrics.includes('memTotal') && Date.now() < end;) {
    metrics = await e2b('sandbox', 'metrics', '--format', 'json', id)
  }
  assert.match(metrics, /"memTotal":\s*\d+/)
  assert.match(await e2b('sandbox', 'kill', id), /has been killed/)
  assert.match(await e2b('sandbox', 'kill', id), /wasn't found/)
})

test('a template is published and deleted', { timeout }, async () => {
  await e2b('template', 'publish', '-y', name)
  const isPublic = async () => JSON.parse(await e2b('template', 'list', '--format', 'json')).find((t) => t.names.includes(name))?.public
  assert.equal(await isPublic(), true)
  await e2b('template', 'unpublish', '-y', name)
  assert.equal(await isPublic(), false)
  await e2b('template', 'delete', '-y', name)
  assert.equal(await isPublic(), undefined)
})
