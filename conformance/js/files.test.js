// The files module through the official JavaScript SDK.
import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { before, test } from 'node:test'
import { FileNotFoundError, InvalidArgumentError } from 'e2b'
import { freshFolder, newSandbox, rejection } from './support.js'

let sbx
before(async () => {
  sbx = await newSandbox()
})

const oddNames = [
  'with space.txt',
  ' leading and trailing ',
  'žluťoučký kůň 🦀.txt',
  `quote's "double" \`back\`.txt`,
  '100%25 %2F %.txt',
  'hash#mark?question&and=eq;semi+plus.txt',
  'line\nbreak',
  'tab\tand\\backslash',
  '-rf',
  '~tilde',
  '$HOME $(id)',
  '...',
  'n'.repeat(255),
]

test('odd names', async (t) => {
  for (const name of oddNames)
    await t.test(JSON.stringify(name).slice(0, 40), async () => {
      const folder = freshFolder()
      const path = `${folder}/${name}`
      const info = await sbx.files.write(path, `content of ${name}`)
      assert.deepEqual([info.name, info.path], [name, path])
      assert.equal(await sbx.files.read(path), `content of ${name}`)
      assert.equal(await sbx.files.exists(path), true)
      assert.equal((await sbx.files.getInfo(path)).name, name)
      assert.deepEqual((await sbx.files.list(folder)).map((entry) => entry.name), [name])
      await sbx.files.rename(path, `${folder}/plain`)
      await sbx.files.rename(`${folder}/plain`, path)
      await sbx.files.remove(path)
      assert.equal(await sbx.files.exists(path), false)
    })
})

test('ten mebibytes in every form', async () => {
  const folder = freshFolder()
  const data = randomBytes(10 << 20)
  const asBuffer = data.buffer.slice(data.byteOffset, data.byteOffset + data.length)
  await sbx.files.write(`${folder}/big`, asBuffer)
  await sbx.files.write(`${folder}/blob`, new Blob([data]))
  await sbx.files.write(`${folder}/stream`, new Blob([data]).stream())
  await sbx.files.write(`${folder}/octet`, asBuffer, { useOctetStream: true })
  await sbx.commands.run(`cd ${folder} && cmp big blob && cmp big stream && cmp big octet`)
  const read = await sbx.files.read(`${folder}/big`, { format: 'bytes' })
  assert.equal(Buffer.compare(Buffer.from(read), data), 0)
  const blob = await sbx.files.read(`${folder}/blob`, { format: 'blob' })
  assert.equal(Buffer.compare(Buffer.from(await blob.arrayBuffer()), data), 0)
  const pieces = []
  for await (const piece of await sbx.files.read(`${folder}/stream`, { format: 'stream' })) pieces.push(piece)
  assert.equal(Buffer.compare(Buffer.concat(pieces), data), 0)
  assert.equal((await sbx.files.getInfo(`${folder}/big`)).size, 10 << 20)
})

test('several files at once, empty ones, overwriting', async () => {
  const folder = freshFolder()
  const infos = await sbx.files.write([
    { path: `${folder}/a`, data: 'A' },
    { path: `${folder}/new/dir/b c`, data: 'B' },
    { path: `${folder}/empty`, data: '' },
  ])
  assert.deepEqual(infos.map((info) => info.path), [`${folder}/a`, `${folder}/new/dir/b c`, `${folder}/empty`])
  assert.equal(await sbx.files.read(`${folder}/new/dir/b c`), 'B')
  assert.equal(await sbx.files.read(`${folder}/empty`), '')
  await sbx.files.write(`${folder}/a`, 'a long first content')
  await sbx.files.write(`${folder}/a`, 'short')
  assert.equal(await sbx.files.read(`${folder}/a`), 'short')
})

test('getInfo and list', async () => {
  const folder = freshFolder()
  await sbx.files.write(`${folder}/sub/f`, '12345')
  await sbx.commands.run(`chmod 640 ${folder}/sub/f`)
  const info = await sbx.files.getInfo(`${folder}/sub/f`)
  assert.deepEqual(
    [info.name, info.type, info.path, info.size, info.mode & 0o777, info.permissions, info.owner, info.group],
    ['f', 'file', `${folder}/sub/f`, 5, 0o640, '-rw-r-----', 'user', 'user']
  )
  assert.ok(Math.abs(info.modifiedTime.getTime() - Date.now()) < 60_000)
  assert.deepEqual((await sbx.files.list(folder)).map((entry) => [entry.name, entry.type]), [['sub', 'dir']])
  assert.deepEqual((await sbx.files.list(folder, { depth: 2 })).map((entry) => entry.name).sort(), ['f', 'sub'])
  await rejection(sbx.files.list(`${folder}/missing`), FileNotFoundError)
  await rejection(sbx.files.list(`${folder}/sub/f`), InvalidArgumentError)
})

test('makeDir, rename, remove', async () => {
  const folder = freshFolder()
  assert.equal(await sbx.files.makeDir(`${folder}/x/y z`), true)
  assert.equal(await sbx.files.makeDir(`${folder}/x/y z`), false)
  await sbx.files.write(`${folder}/a`, 'A')
  const moved = await sbx.files.rename(`${folder}/a`, `${folder}/x/b`)
  assert.deepEqual([moved.name, moved.path], ['b', `${folder}/x/b`])
  await rejection(sbx.files.rename(`${folder}/a`, `${folder}/z`), FileNotFoundError)
  await sbx.files.remove(`${folder}/x`)
  assert.equal(await sbx.files.exists(`${folder}/x/b`), false)
})

test('what is missing', async () => {
  const folder = freshFolder()
  assert.equal(await sbx.files.exists(`${folder}/nothing`), false)
  for (const format of ['text', 'bytes', 'blob', 'stream']) await rejection(sbx.files.read(`${folder}/nothing`, { format }), FileNotFoundError)
  await rejection(sbx.files.getInfo(`${folder}/nothing`), FileNotFoundError)
})

test('relative paths and users', async () => {
  const name = freshFolder().split('/').pop()
  assert.equal((await sbx.files.write(`${name}/rel`, 'mine')).path, `/home/user/${name}/rel`)
  assert.equal((await sbx.files.write(`${name}`.concat('-root'), 'r', { user: 'root' })).path, `/root/${name}-root`)
  assert.equal((await sbx.files.getInfo(`/root/${name}-root`, { user: 'root' })).owner, 'root')
})
