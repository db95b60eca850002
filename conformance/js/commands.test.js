// commands.run and its relatives through the official JavaScript SDK.
import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { before, test } from 'node:test'
import { CommandExitError, InvalidArgumentError, NotFoundError, TimeoutError } from 'e2b'
import { freshFolder, newSandbox, rejection, waitFor } from './support.js'

let sbx
before(async () => {
  sbx = await newSandbox({ envs: { GREETING: 'hello', PLACE: 'base' } })
})

const pids = async () => (await sbx.commands.list()).map((process) => process.pid)

test('stdout, stderr and exit code', async () => {
  const result = await sbx.commands.run('echo out; echo err >&2')
  assert.deepEqual([result.stdout, result.stderr, result.exitCode], ['out\n', 'err\n', 0])
})

test('a failing command throws with all it said', async () => {
  const error = await rejection(sbx.commands.run('echo so far; echo so bad >&2; exit 7'), CommandExitError)
  assert.deepEqual([error.exitCode, error.stdout, error.stderr], [7, 'so far\n', 'so bad\n'])
})

test('output is exact: unicode, no last newline, large', async () => {
  assert.equal((await sbx.commands.run("printf 'žluťoučký 🦀 %s' end")).stdout, 'žluťoučký 🦀 end')
  const expected = Array.from({ length: 60000 }, (_, n) => `${n + 1}\n`).join('')
  assert.equal((await sbx.commands.run('seq 1 60000')).stdout, expected)
})

test('callbacks stream while the command runs', async () => {
  // The command waits for a file that only the callback makes.
  const folder = freshFolder()
  let out = ''
  let err = ''
  const result = await sbx.commands.run(
    `echo ready; until [ -e ${folder}/go ]; do sleep 0.05; done; echo done; echo problem >&2`,
    {
      onStdout: async (text) => {
        out += text
        if (text.includes('ready')) await sbx.files.write(`${folder}/go`, 'now')
      },
      onStderr: (text) => {
        err += text
      },
    }
  )
  assert.deepEqual([out, err, result.stdout], ['ready\ndone\n', 'problem\n', 'ready\ndone\n'])
})

test('envs of the sandbox and of the command', async () => {
  const show = 'echo "$GREETING $PLACE $EXTRA"'
  assert.equal((await sbx.commands.run(show)).stdout, 'hello base \n')
  const own = await sbx.commands.run(show, { envs: { PLACE: `it's "here" $HOME`, EXTRA: 'ünï' } })
  assert.equal(own.stdout, `hello it's "here" $HOME ünï\n`)
})

test('user and cwd', async () => {
  const out = async (command, options) => (await sbx.commands.run(command, options)).stdout
  assert.equal(await out('id -un; pwd; echo $HOME'), 'user\n/home/user\n/home/user\n')
  assert.equal(await out('id -u; pwd', { user: 'root' }), '0\n/root\n')
  assert.equal(await out('pwd', { cwd: '/tmp' }), '/tmp\n')
  const error = await rejection(sbx.commands.run('pwd', { cwd: '/no/such/folder' }), InvalidArgumentError)
  assert.match(error.message, /\/no\/such\/folder/)
  await assert.rejects(sbx.commands.run('true', { user: 'nobody-by-this-name' }), /nobody-by-this-name/)
})

test('stdin: none, sent, closed', async () => {
  assert.equal((await sbx.commands.run('cat; echo over', { timeoutMs: 20_000 })).stdout, 'over\n')
  const handle = await sbx.commands.run('cat; echo end', { background: true, stdin: true })
  await sbx.commands.sendStdin(handle.pid, 'first\n')
  await handle.sendStdin(new TextEncoder().encode('second žluť\n'))
  await handle.closeStdin()
  assert.equal((await handle.wait()).stdout, 'first\nsecond žluť\nend\n')
  await rejection(sbx.commands.sendStdin(4194000, 'x'), NotFoundError)
})

test('a large stdin arrives whole', async () => {
  const handle = await sbx.commands.run('head -c 1000000 | sha256sum', { background: true, stdin: true })
  const piece = Buffer.alloc(250_000, 'abcdefghij')
  for (let n = 0; n < 4; n++) await handle.sendStdin(piece)
  const expected = createHash('sha256').update(Buffer.alloc(1_000_000, 'abcdefghij')).digest('hex')
  assert.equal((await handle.wait()).stdout.split(' ')[0], expected)
})

test('background, list, wait', async () => {
  const folder = freshFolder()
  const handle = await sbx.commands.run(`until [ -e ${folder} ]; do sleep 0.05; done; echo late; exit 3`, { background: true })
  const listed = (await sbx.commands.list()).find((process) => process.pid === handle.pid)
  assert.deepEqual([listed.cmd, listed.args.slice(0, 2)], ['/bin/bash', ['-l', '-c']])
  await sbx.files.makeDir(folder)
  const error = await rejection(handle.wait(), CommandExitError)
  assert.deepEqual([error.exitCode, error.stdout], [3, 'late\n'])
  assert.ok(!(await pids()).includes(handle.pid))
})

test('kill', async () => {
  const handle = await sbx.commands.run('sleep 600', { background: true })
  assert.equal(await handle.kill(), true)
  const error = await rejection(handle.wait(), CommandExitError)
  assert.notEqual(error.exitCode, 0)
  assert.equal(await sbx.commands.kill(handle.pid), false)
})

test('disconnect leaves it running, connect finds it', async () => {
  const folder = freshFolder()
  const handle = await sbx.commands.run(`until [ -e ${folder} ]; do sleep 0.05; done; echo two`, { background: true })
  await handle.disconnect()
  assert.ok((await pids()).includes(handle.pid))
  let heard = ''
  const again = await sbx.commands.connect(handle.pid, { onStdout: (text) => void (heard += text) })
  await sbx.files.makeDir(folder)
  assert.equal((await again.wait()).stdout, 'two\n')
  assert.equal(heard, 'two\n')
  await rejection(sbx.commands.connect(4194000), NotFoundError)
})

test('timeout ends the command', async () => {
  await rejection(sbx.commands.run('exec sleep 602', { timeoutMs: 1000 }), TimeoutError)
  await waitFor(
    'the timed-out command to be gone',
    async () => !(await sbx.commands.list()).some((process) => process.args.join(' ').includes('sleep 602')),
    20
  )
})

test('commands at once do not mix', async () => {
  const outputs = await Promise.all(
    [0, 1, 2, 3, 4, 5].map(async (n) => (await sbx.commands.run(`for i in 1 2 3; do echo ${n}-$i; done`)).stdout)
  )
  assert.deepEqual(outputs, [0, 1, 2, 3, 4, 5].map((n) => `${n}-1\n${n}-2\n${n}-3\n`))
})
