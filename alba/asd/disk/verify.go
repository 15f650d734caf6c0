package disk

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"

	"scoria/alba/asd"
	"scoria/alba/vfs"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/sstable"
)

// defaultVerifyBytes is what one call checks at least, if there is as much.
const defaultVerifyBytes = 16 << 20

// The cursor of a Verify is one of these and the key or file to begin with.
const (
	cursorKey   = "k"
	cursorTable = "t"
)

const (
	// verifyKeyCost in bytes is what a key counts besides its value, so that a
	// stretch of small ones ends as well.
	verifyKeyCost = 512
	// maxBad entries end a stretch; maxBadOfKey of one key become one.
	maxBad      = 1024
	maxBadOfKey = 64
)

// verifier is one call of Verify.
type verifier struct {
	d     *Disk
	max   int64
	cost  int64
	ofKey int // entries of the last key in res.Bad
	res   asd.VerifyResult
}

// full says that the stretch is long enough.
func (v *verifier) full() bool { return v.res.Bytes+v.cost >= v.max || len(v.res.Bad) >= maxBad }

// Verify implements asd.Client. It runs at PriorityRepair, one value at a time.
func (d *Disk) Verify(ctx context.Context, req asd.VerifyRequest) (asd.VerifyResult, error) {
	if err := d.enter(); err != nil {
		return asd.VerifyResult{}, err
	}
	defer d.leave()
	v := &verifier{d: d, max: req.MaxBytes}
	if v.max <= 0 {
		v.max = defaultVerifyBytes
	}
	var err error
	switch name := req.Cursor; {
	case name == "":
		err = v.values(ctx, "")
	case name[:1] == cursorKey:
		err = v.values(ctx, name[1:])
	case name[:1] == cursorTable:
		err = v.tables(ctx, name[1:])
	default:
		err = fmt.Errorf("%w: cursor %q", asd.ErrInvalid, name)
	}
	if err != nil {
		return asd.VerifyResult{}, err
	}
	return v.res, nil
}

// verifyPage bounds the keys whose values are checked between two looks at the
// key-value store, so that no iterator pins its files for long.
const verifyPage = 256

// values checks the values from a key on, then goes on to the tables.
func (v *verifier) values(ctx context.Context, from string) error {
	for {
		var keys []string
		err := v.d.scan(prefixKey, from, "", func(key string, _ []byte) (bool, error) {
			keys = append(keys, key)
			return len(keys) < verifyPage, nil
		})
		if err != nil {
			// What follows in this table can't be listed; the tables are named below.
			v.bad("", err)
		}
		for i, key := range keys {
			if v.full() {
				v.res.Next = cursorKey + keys[i]
				return nil
			}
			if err := v.value(ctx, key); err != nil {
				return err
			}
		}
		if len(keys) < verifyPage || err != nil {
			return v.tables(ctx, "")
		}
		from = keys[len(keys)-1] + "\x00"
		if len(from) > asd.MaxKeyBytes {
			// A key of the largest length: the next one differs in its last byte.
			from = keys[len(keys)-1]
			if from = successor(from); from == "" {
				return v.tables(ctx, "")
			}
		}
	}
}

// successor returns the smallest string of at most the same length that is
// larger, "" if there is none.
func successor(s string) string {
	b := []byte(s)
	for len(b) > 0 {
		if b[len(b)-1]++; b[len(b)-1] != 0 {
			return string(b)
		}
		b = b[:len(b)-1]
	}
	return ""
}

// value checks one value from the disk, not from the cache of pages or handles.
func (v *verifier) value(ctx context.Context, key string) error {
	if err := v.d.gate.acquire(ctx, asd.PriorityRepair); err != nil {
		return err
	}
	defer v.d.gate.release(asd.PriorityRepair)
	err := v.d.withRecord(key, func(rec *record) error {
		v.res.Keys++
		v.cost += verifyKeyCost
		v.res.Bytes += rec.size
		if rec.fileID == 0 {
			return v.inline(key, rec)
		}
		return v.file(key, rec)
	})
	if errors.Is(err, asd.ErrNoKey) {
		return nil // deleted meanwhile
	}
	if errors.Is(err, asd.ErrCorrupt) {
		v.bad(key, err)
		return nil
	}
	return err
}

func (v *verifier) inline(key string, rec *record) error {
	if asd.SumOf(rec.size, rec.blockSize, decodeCRCs(rec.crcs)) != rec.sum {
		return v.d.corrupt(key, 0, 0, "its checksums are not the ones that were put")
	}
	return v.d.verify(key, rec.data, 0, rec.blockSize, rec.crc)
}

// file reads a value file block by block in large steps and notes every bad
// block, not only the first.
func (v *verifier) file(key string, rec *record) error {
	if f, err := v.d.fs.Open(v.d.valueName(rec.fileID), vfs.ReadOnly); err == nil {
		_ = f.DropCache(rec.fileOff, rec.room(key))
		_ = f.Close()
	}
	f, head, err := v.d.openValueFile(key, rec, 0, 0)
	if err != nil {
		return err
	}
	h := &handle{file: f, head: head}
	defer f.Close()
	step := max(1<<20/rec.blockSize, 1) * rec.blockSize
	buf := make([]byte, min(int64(step), rec.size))
	for off := int64(0); off < rec.size; off += int64(step) {
		p := buf[:min(int64(len(buf)), rec.size-off)]
		if err := v.d.readFile(h, key, p, off); err == nil {
			v.blocks(h, key, p, off)
		} else if errors.Is(err, asd.ErrCorrupt) {
			v.bad(key, err)
		} else {
			return err
		}
	}
	_ = f.DropCache(rec.fileOff, rec.room(key))
	return nil
}

func (v *verifier) blocks(h *handle, key string, p []byte, off int64) {
	bs := h.head.blockSize
	for i := int(off / int64(bs)); len(p) > 0; i++ {
		n := min(bs, len(p))
		if asd.CRC(p[:n]) != h.head.crcs[i] {
			v.bad(key, v.d.corrupt(key, int64(i)*int64(bs), int64(n), "fails its checksum"))
		}
		p = p[n:]
	}
}

// bad notes damage; neighbouring blocks become one entry, and so does the rest
// of a value that is damaged in very many places.
func (v *verifier) bad(key string, err error) {
	b := asd.BadBlocks{Key: key, Reason: err.Error()}
	var c *asd.CorruptError
	if errors.As(err, &c) && key != "" {
		b.Off, b.Size, b.Reason = c.Off, c.Size, c.Reason
	}
	n := len(v.res.Bad)
	if n == 0 || v.res.Bad[n-1].Key != key || key == "" {
		v.ofKey = 0
	} else if last := &v.res.Bad[n-1]; b.Size > 0 && (last.Off+last.Size == b.Off || v.ofKey >= maxBadOfKey) {
		last.Size = b.Off + b.Size - last.Off
		return
	}
	v.ofKey++
	v.res.Bad = append(v.res.Bad, b)
}

// tables checks the sorted tables of the key-value store from a name on.
func (v *verifier) tables(ctx context.Context, from string) error {
	names, err := v.d.tableNames()
	if err != nil {
		return err
	}
	for _, name := range names {
		if name < from {
			continue
		}
		if v.full() {
			v.res.Next = cursorTable + name
			return nil
		}
		if err := v.table(ctx, name); err != nil {
			return err
		}
	}
	if err := v.journals(ctx); err != nil {
		return err
	}
	v.res.Next, v.res.Done = "", true
	return nil
}

// table checks a sorted table that was listed.
func (v *verifier) table(ctx context.Context, name string) error {
	if err := v.d.gate.acquire(ctx, asd.PriorityRepair); err != nil {
		return err
	}
	size, err := v.d.verifyTable(ctx, path.Join(v.d.dir, "kv", name))
	v.d.gate.release(asd.PriorityRepair)
	v.res.Bytes += size
	if isNotExist(err) {
		// Compaction may have removed it; then it is not listed any more.
		now, lerr := v.d.tableNames()
		if lerr != nil {
			return lerr
		}
		if !slices.Contains(now, name) {
			return nil
		}
	}
	if err != nil {
		v.d.n.corruptBlocks.Add(1)
		v.d.setDamaged(name + ": " + err.Error())
		v.bad("", fmt.Errorf("%s: %w", name, err))
	}
	return nil
}

// journals checks what the key-value store reads at its next start only: its log,
// its manifest and the ASD's identity. All of them are in memory as well, or twice on
// the disk, so that they are mended at once.
func (v *verifier) journals(ctx context.Context) error {
	if err := v.d.gate.acquire(ctx, asd.PriorityRepair); err != nil {
		return err
	}
	defer v.d.gate.release(asd.PriorityRepair)
	for _, name := range v.d.durable.list() {
		size, ok := v.d.durable.of(name)
		var reason string
		var err error
		if number, log := walNumber(name); log {
			reason, err = v.d.verifyLog(name, number, size)
		} else {
			reason, err = v.d.verifyManifest(name, size)
		}
		v.res.Bytes += size
		if _, still := v.d.durable.of(name); !ok || !still {
			continue // it is no longer needed
		}
		if err != nil {
			return err
		}
		if reason != "" {
			v.d.n.corruptBlocks.Add(1)
			v.bad("", fmt.Errorf("%s: %s", path.Base(name), reason))
		}
	}
	if id, err := readIdentity(v.d.fs, v.d.dir); err != nil || id != v.d.id {
		v.d.n.corruptBlocks.Add(1)
		if werr := writeIdentity(v.d.fs, v.d.dir, v.d.id); werr != nil {
			return werr
		}
		v.bad("", errors.New("identity: was damaged, and is written anew"))
	}
	return nil
}

// verifyLog reads the log's durable part. If it is damaged, what it is for is written
// into a table.
func (d *Disk) verifyLog(name string, number uint32, size int64) (reason string, err error) {
	b, err := readAll(d.fs, name)
	if err != nil {
		return "", err
	}
	b = b[:min(size, int64(len(b)))]
	end, _ := walEnd(b, number)
	if end >= size || walEnded(b, end, number) {
		return "", nil
	}
	if err := d.db.Flush(); err != nil {
		return "", fmt.Errorf("write a damaged log's contents into a table: %w", kvError(err))
	}
	return fmt.Sprintf("damaged at byte %d; its contents are written into a table", end), nil
}

func (d *Disk) verifyManifest(name string, size int64) (reason string, err error) {
	mended, err := verifyManifest(d.fs, name, size)
	switch {
	case errors.Is(err, errTwins):
		d.setDamaged(path.Base(name) + ": " + err.Error())
		return err.Error(), nil
	case err != nil || len(mended) == 0:
		return "", err
	}
	return fmt.Sprintf("%s: was damaged, and is written anew from its copy", mended[0]), nil
}

// tableNames lists the files of the sorted tables that the key-value store consists of.
func (d *Disk) tableNames() ([]string, error) {
	levels, err := d.tables()
	if err != nil {
		return nil, fmt.Errorf("list the key-value store's files: %w", kvError(err))
	}
	var names []string
	for _, level := range levels {
		for _, t := range level {
			names = append(names, t.BackingSSTNum.String()+".sst")
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// tables asks the key-value store, which never answers once it is stuck.
func (d *Disk) tables() ([][]pebble.SSTableInfo, error) {
	type answer struct {
		levels [][]pebble.SSTableInfo
		err    error
	}
	done := make(chan answer, 1)
	go func() {
		levels, err := d.db.SSTables()
		done <- answer{levels, err}
	}()
	select {
	case a := <-done:
		return a.levels, a.err
	case <-d.stuck:
		return nil, d.failErr()
	}
}

// verifyTable reads a sorted table from the disk.
func (d *Disk) verifyTable(ctx context.Context, name string) (size int64, err error) {
	f, err := kvFS{fs: d.fs}.Open(name)
	if err != nil {
		return 0, kvError(err)
	}
	info, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return 0, kvError(err)
	}
	_ = f.(*kvFile).DropCache(0, info.Size())
	readable, err := sstable.NewSimpleReadable(f)
	if err != nil {
		_ = f.Close()
		return 0, kvError(err)
	}
	r, err := sstable.NewReader(ctx, readable, d.tableOpts)
	if err != nil {
		return info.Size(), kvError(err) // it closed readable
	}
	defer r.Close()
	return info.Size(), kvError(r.ValidateBlockChecksums())
}
