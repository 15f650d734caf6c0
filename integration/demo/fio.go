package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// fioScript is the guest's load. Its only output is fio's JSON.
const fioScript = `fio --name=demo --directory=/mnt --rw=randwrite --bs=4k --size=96m --numjobs=2 --direct=1 \
  --ioengine=libaio --iodepth=16 --fsync=256 --verify=crc32c --verify_fatal=1 \
  --output-format=json --output=/tmp/fio.json --eta=never >/tmp/fio.log 2>&1 || { cat /tmp/fio.log /tmp/fio.json; exit 1; }
cat /tmp/fio.json`

// fioResult is what the demonstration tells of fio's report.
type fioResult struct {
	writes, reads       uint64
	writeIOPS, readIOPS float64 // sums over the jobs
	longestWrite        time.Duration
}

// parseFio reads fio's JSON, which may follow warnings.
func parseFio(out string) (fioResult, error) {
	type direction struct {
		IOs  uint64  `json:"total_ios"`
		IOPS float64 `json:"iops"`
		Clat struct {
			Max float64 `json:"max"`
		} `json:"clat_ns"`
	}
	var doc struct {
		Jobs []struct {
			Error int       `json:"error"`
			Read  direction `json:"read"`
			Write direction `json:"write"`
		} `json:"jobs"`
	}
	at := strings.IndexByte(out, '{')
	if at < 0 {
		return fioResult{}, fmt.Errorf("fio printed no JSON: %q", out)
	}
	if err := json.Unmarshal([]byte(out[at:]), &doc); err != nil {
		return fioResult{}, fmt.Errorf("fio's report: %w in %q", err, out)
	}
	var r fioResult
	for i, j := range doc.Jobs {
		if j.Error != 0 {
			return fioResult{}, fmt.Errorf("fio's job %d ended with error %d", i, j.Error)
		}
		r.writes += j.Write.IOs
		r.reads += j.Read.IOs
		r.writeIOPS += j.Write.IOPS
		r.readIOPS += j.Read.IOPS
		r.longestWrite = max(r.longestWrite, time.Duration(j.Write.Clat.Max))
	}
	return r, nil
}
